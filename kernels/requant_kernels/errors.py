"""The two ways in which input can be refused; both carry one line that a user can act on."""


class SchemeError(ValueError):
    """A quantization scheme that does not exist or contradicts itself."""


class CheckpointError(ValueError):
    """A checkpoint whose tensors or configuration are not what the format says."""
