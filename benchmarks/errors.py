"""What went wrong, said in one line."""

from pydantic import ValidationError


class Unusable(ValueError):
    """A model, text or setting that cannot be measured; `option` is the command-line option that would mend it."""

    def __init__(self, text: str, option: str) -> None:
        super().__init__(text)
        self.option = option


def message(error: BaseException) -> str:
    """The text of an error, without line breaks."""
    if isinstance(error, ValidationError):
        # pydantic's own text spreads over lines and ends in an address
        return "; ".join(
            f"{'.'.join(map(str, each['loc']))}: {reason}" if each["loc"] else reason
            for each in error.errors()
            for reason in [each["msg"].removeprefix("Value error, ")]
        )
    return " ".join(str(error).split())[:500] or type(error).__name__
