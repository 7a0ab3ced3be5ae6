PREDICATE_HOOKS = ("allowed", "allowed_by_tensors", "holds_throughout", "holds_nowhere")


def predicate_source(text: str, name: str) -> str:
    raise NotImplementedError
