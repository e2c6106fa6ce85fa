"""The one exception that users of dwconv meet."""


class DepthwiseError(ValueError):
    """A request that dwconv can't serve.

    The message is one sentence or two: what was asked for, which limit it met, and what to do instead.
    """
