"""The one error type that users see, and the one place that prints it."""

import difflib
import io
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence

USER_ERROR_EXIT_CODE = 2


class UserError(Exception):
    """Something the user can mend: one sentence naming the place, what was expected and the way out."""

    exit_code = USER_ERROR_EXIT_CODE
    # Whether another process that found the same prints it; None where who raised it doesn't know.
    told: bool | None = None


class RunFailed(UserError):
    """Work that began on input in order, and failed later."""

    exit_code = 1


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'X'?` for the known word nearest to `word`, or the empty string."""
    nearest = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


JSON_ERRORS = (ValueError, RecursionError)  # of json.loads, and of decoding what it is given


def json_fault(error: BaseException) -> str:
    """What keeps a line of text from being JSON, in a few words; `error` is one of JSON_ERRORS."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    if isinstance(error, UnicodeDecodeError):
        return "not UTF-8 text"
    return "a number of too many digits, or brackets nested too deeply"


def tell(error: UserError) -> None:
    """Print the error, unless another process has."""
    if not error.told:
        print(f"error: {error}", file=sys.stderr)


def drop_output() -> None:
    """Drop standard output from now on, and what Python still holds of it: whoever read it has left (`| head`)."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run_command(command: Callable[[Sequence[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Run a command's `main(argv)` and return the exit code: a UserError is printed as one line, without traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # names of files that are no text are printed as they are
    try:
        return command(sys.argv[1:] if argv is None else argv) or 0
    except UserError as error:
        tell(error)
        return error.exit_code
    except BrokenPipeError:
        drop_output()
        return 1
    except OSError as error:
        # Commands tell the faults of their files in their own words; this is for those that no one foresees.
        if error.filename is None:
            raise
        print(f"error: {os.fsdecode(error.filename)}: {error.strerror or error}; check the path", file=sys.stderr)
        return USER_ERROR_EXIT_CODE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
