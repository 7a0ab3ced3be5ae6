ACTIVATION_HOOKS = ("activation", "activation_backward", "activation_and_backward")


def activation_source(text: str, name: str) -> str:
    raise NotImplementedError
