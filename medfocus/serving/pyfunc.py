"""The registered model. MLflow keeps a copy of this file as the model's code.

MLflow's scoring server calls ``predict`` from several threads, prefixes error messages with the request's
data, and sends a stack trace with every exception that is not an MlflowException. Therefore one thread
predicts at a time, and every exception of this module is an MlflowException that serializes to its message.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from medfocus.images.decode import MOST_BYTES
from medfocus.images.errors import ImageError, TooLargeError
from medfocus.serving.model_folder import load_model
from medfocus.storage.redaction import kind_and_place

MOST_IMAGES = 64  # of a request to a server; a call in the same process may have more
_SERVING = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"  # the scoring server sets this variable


class ServedError(MlflowException, ValueError):
    """A fault in one or two sentences; the client receives nothing else."""

    def __init__(self, sentence: str, status: int = 400) -> None:
        super().__init__(sentence, INTERNAL_ERROR if status == 500 else INVALID_PARAMETER_VALUE)
        self.sentence, self.status = sentence, status

    def serialize_as_json(self) -> str:
        """Serialize without ``message``, which the server prefixes with the request's data."""
        return json.dumps({"error_code": self.error_code, "message": self.sentence})

    def get_http_status_code(self) -> int:
        """Return 400 or 413 for a fault of the request, 500 for a fault of the server."""
        return self.status


class FocusClassifier(PythonModel):
    """A model that maps raw image bytes to class probabilities and mask overlays."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model folder from the artifact ``model``."""
        self.predictor = load_model(Path(context.artifacts["model"]))
        self.one_at_a_time = threading.Lock()

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  # the base class returns None
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Predict the encoded images (bytes or base64 text) of the column ``image``, one row each.

        The columns are label, probability_<class> for every class, set (a list of classes), mask_status,
        mask_score and overlay (PNG in base64). A model without sets has the column no_set, with the reason,
        in place of set. With the parameter ``overlay`` false, the last column is omitted.
        Raises ServedError, a ValueError, with the image's place in the batch. Any thread may call this.
        """
        overlay = (params or {}).get("overlay", True)
        images = _images(model_input)
        try:
            with self.one_at_a_time:
                predictions = self.predictor.predict(images, overlay=overlay)
        except ImageError as error:
            raise ServedError(str(error), 413 if isinstance(error, TooLargeError) else 400) from error
        except Exception as error:
            logging.getLogger(__name__).exception("A prediction failed.")
            fault = f"the prediction failed in the server ({kind_and_place(error)})"
            raise ServedError(f"{fault}. Read the server's log.", 500) from error
        no_set = self.predictor.calibration.no_set
        return pd.DataFrame(
            {
                "label": prediction.label,
                **{f"probability_{name}": p for name, p in prediction.probabilities.items()},
                **({"no_set": no_set} if no_set else {"set": list(prediction.set)}),
                "mask_status": prediction.mask_status,
                "mask_score": prediction.mask_score,
                **({"overlay": base64.b64encode(prediction.overlay).decode()} if overlay else {}),
            }
            for prediction in predictions
        )


def _images(model_input: pd.DataFrame) -> list[bytes]:
    """Return the encoded images of a request. Raises ServedError for a request beyond the limits."""
    if "image" not in model_input:
        raise ServedError(
            "the request has no column 'image'. Send the images in this column, each in base64."
        )
    values = model_input["image"].tolist()
    if not values:
        raise ServedError("the request has no image. Send at least one in the column 'image'.")
    if os.environ.get(_SERVING) == "true":
        _check_size(values)
    return [_bytes(value, f"image {i + 1} of {len(values)}") for i, value in enumerate(values)]


def _check_size(values: Sequence[object]) -> None:
    if len(values) > MOST_IMAGES:
        fault = f"the request has {len(values)} images, and the limit is {MOST_IMAGES}"
        raise ServedError(f"{fault}. Send several requests.", 413)
    size = sum(len(value) * 3 // 4 for value in values if isinstance(value, str))
    if size > MOST_BYTES:
        fault = (
            f"the request's images have {size // 1_000_000} MB, and the limit is {MOST_BYTES // 1_000_000}"
        )
        raise ServedError(f"{fault}. Send several requests.", 413)


def _bytes(value: object, name: str) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except ValueError as error:  # binascii.Error, or a character that is not ASCII
            raise ServedError(f"{name}: is not base64 ({error}). Encode the file's bytes.") from error
    raise ServedError(f"{name}: has type {type(value).__name__}. Send a file's bytes, or their base64 text.")


set_model(FocusClassifier())
