"""An activation as Triton functions: the program that runs on a CPU (`codegen/expr.py`), printed.

Sums and products are printed as infix expressions, everything else as calls of `codegen/templates/elementary.py`.
"""

from __future__ import annotations

from sptc.codegen.expr import program
from sptc.codegen.infix import Dialect, printed
from sptc.codegen.source import docstring, wrapped

ACTIVATION_HOOKS: dict[str, dict[str, bool]] = {  # what `program` is asked for
    "activation": {"value": True},
    "activation_backward": {"gradients": True},
    "activation_and_backward": {"value": True, "gradients": True},
}
HELPERS = "elementary"
_DIALECT = Dialect(number=repr, assign="{} = {}".format, full="tl.full({}.shape, {}, tl.float32)".format)


def activation_source(text: str, name: str) -> str:
    """The function that a hook stands for, on fp32 tensors of one shape.

    Args:
        text: canonical text of an activation.
        name: of ACTIVATION_HOOKS: what it takes and returns stands in `codegen/templates/language.py`.

    Raises:
        ExpressionError: `text` is no activation.
    """
    steps = program(text, **ACTIVATION_HOOKS[name])
    lines, outputs = printed(steps, _DIALECT)
    return "\n".join(
        [
            "@triton.jit",
            f"def {name}({', '.join(steps.inputs)}):",
            *docstring(_meaning(text, name)),
            *(line for statement in lines for line in wrapped(statement, 4)),
            *wrapped(f"return {', '.join(outputs)}", 4),
            "",
        ]
    )


def _meaning(text: str, name: str) -> str:
    slope = "grad times the derivative of it in each u"
    return {"activation": text, "activation_backward": f"For {text}: {slope}.", "activation_and_backward": f"{text}, and {slope}."}[name]
