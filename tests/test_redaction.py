"""The text of an error appears only on the terminal; databases get its type and place."""

from __future__ import annotations

import pickle
import traceback
from pathlib import Path

import pytest

from medfocus.images import decode
from medfocus.images.errors import ImageError
from medfocus.storage.redaction import RedactedError, kind_and_place, redacted, unredacted


@redacted
def read(path: Path) -> int:
    """Return the size of an image."""
    return decode.read(path).size


def raised(path: Path) -> RedactedError:
    with pytest.raises(RedactedError) as caught:
        read(path)
    return caught.value


def test_the_text_of_an_error_appears_only_on_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "DOE_JANE.png"
    image.touch()
    error = raised(image)
    assert str(error).startswith("ImageError at medfocus.images.decode:")
    logged = "".join(traceback.format_exception(error))
    assert "ImageError at medfocus.images.decode:" in logged and "DOE_JANE" not in logged
    assert f"{image}: the file is empty (0 bytes). Copy it again" in capsys.readouterr().err
    assert isinstance(unredacted(error), ImageError) and "DOE_JANE" in str(unredacted(error))


def test_an_expected_error_is_one_line_and_any_other_has_a_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.png").touch()
    raised(tmp_path / "empty.png")
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and printed.startswith("medfocus.images.errors.ImageError: ")
    raised(tmp_path / "nowhere.png")  # an OSError
    assert "Traceback" in capsys.readouterr().err


def test_nested_decorators_print_an_error_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RedactedError) as caught:
        redacted(redacted(read))(tmp_path / "nowhere.png")
    assert isinstance(caught.value.error, FileNotFoundError)
    assert capsys.readouterr().err.count("nowhere.png") == 1


def test_a_pickled_error_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "DOE_JANE.png").touch()
    kept = pickle.dumps(raised(tmp_path / "DOE_JANE.png"))
    assert b"DOE_JANE" not in kept
    error = pickle.loads(kept)
    assert unredacted(error) is error and str(error).startswith("ImageError at medfocus.images.decode:")


def test_results_pass_through_and_errors_of_other_code_keep_their_place() -> None:
    assert redacted(max)(1, 2) == 2
    with pytest.raises(ValueError, match="DOE_JANE") as caught:
        int("DOE_JANE")
    assert kind_and_place(caught.value).startswith("ValueError at ")
    assert "DOE" not in kind_and_place(caught.value)
    assert kind_and_place(KeyError("DOE_JANE")) == "KeyError"
