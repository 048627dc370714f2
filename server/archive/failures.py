"""What can go wrong on a photo's way, and whether to try again."""

__all__ = ["Failure"]


class Failure(Exception):
    """A step failed.

    Args:
        reason: one of a few words, which metrics count by.
        detail: for people. It is logged and kept, so nothing of what an archive says about a
            patient may be in it.
        final: whether the same step would fail again.
        retry_after_s: seconds after which the other side wants to be asked again, if it said so.
    """

    def __init__(
        self, reason: str, detail: str, *, final: bool = False, retry_after_s: float = 0
    ) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail
        self.final = final
        self.retry_after_s = retry_after_s
