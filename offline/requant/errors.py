"""The one exception for input that can not be used; commands print it as one line and exit with 1."""


class InputError(ValueError):
    """A model, text, recipe or folder that a user named and that can not be used; says which, why and the way out."""
