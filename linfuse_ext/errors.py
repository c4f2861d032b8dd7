"""What is raised where a merge would not be exact."""

__all__ = ["FusionError"]


class FusionError(ValueError):
    """Two layers have no exact merge of the kind that was asked for.

    The message names the rule that they break, the numbers of both layers, and what would work
    instead.
    """
