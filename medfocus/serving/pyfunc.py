"""The registered model as MLflow runs it; MLflow keeps this file as the model's code and loads that copy.

MLflow's scoring server calls ``predict`` from several threads, puts the data it was sent before the text of
an error, and sends a stack trace with every error that is not its own. So one thread predicts at a time, and
every error that leaves here is MLflow's, with one sentence and nothing else in it.
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
from medfocus.serving.predictor import Predictor
from medfocus.storage.redaction import kind_and_place

MOST_IMAGES = 64  # of a request to a server; what runs in a process of its own may give more
_SERVING = "_MLFLOW_IS_IN_SERVING_ENVIRONMENT"  # what the scoring server sets


class ServedError(MlflowException, ValueError):
    """A fault in one or two sentences, which are all that the client gets."""

    def __init__(self, sentence: str, status: int = 400) -> None:
        super().__init__(sentence, INTERNAL_ERROR if status == 500 else INVALID_PARAMETER_VALUE)
        self.sentence, self.status = sentence, status

    def serialize_as_json(self) -> str:
        """Without what the server wrote into ``message``: the data that it was sent."""
        return json.dumps({"error_code": self.error_code, "message": self.sentence})

    def get_http_status_code(self) -> int:
        """400 or 413 where the request is at fault, 500 where it is not."""
        return self.status


class FocusClassifier(PythonModel):
    """Raw image bytes in, class probabilities and the mask overlay out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model folder that was logged as the artefact ``model``."""
        self.predictor = Predictor.load(Path(context.artifacts["model"]))
        self.one_at_a_time = threading.Lock()

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  # MLflow's own returns None
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Column ``image`` of encoded images, bytes or base64 text -> one row per image.

        The columns are label, probability_<class> for every class, mask_status, mask_score and overlay (PNG
        in base64). The parameter ``overlay``, true unless told, says whether the last one is made.
        Raises ServedError, a ValueError, naming the image's place in the batch. Any thread may call it.
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
            told = f"the prediction failed at no fault of the request ({kind_and_place(error)})"
            raise ServedError(f"{told}. Look into the server's log.", 500) from error
        return pd.DataFrame(
            {
                "label": prediction.label,
                **{f"probability_{name}": p for name, p in prediction.probabilities.items()},
                "mask_status": prediction.mask_status,
                "mask_score": prediction.mask_score,
                **({"overlay": base64.b64encode(prediction.overlay).decode()} if overlay else {}),
            }
            for prediction in predictions
        )


def _images(model_input: pd.DataFrame) -> list[bytes]:
    """The encoded images of a request that is not past the limits. Raises ServedError."""
    if "image" not in model_input:
        raise ServedError("the request has no column 'image'. Give the images there, each in base64.")
    values = model_input["image"].tolist()
    if not values:
        raise ServedError("the request has no image. Give one at least, in the column 'image'.")
    if os.environ.get(_SERVING) == "true":
        _check_size(values)
    return [_bytes(value, f"image {i + 1} of {len(values)}") for i, value in enumerate(values)]


def _check_size(values: Sequence[object]) -> None:
    if len(values) > MOST_IMAGES:
        told = f"the request has {len(values)} images, and {MOST_IMAGES} are the most"
        raise ServedError(f"{told}. Send them in several requests.", 413)
    size = sum(len(value) * 3 // 4 for value in values if isinstance(value, str))
    if size > MOST_BYTES:
        told = f"the request's images have {size // 1_000_000} MB, and {MOST_BYTES // 1_000_000} are the most"
        raise ServedError(f"{told}. Send them in several requests.", 413)


def _bytes(value: object, name: str) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except ValueError as error:  # binascii's own, or that a letter is not ASCII
            raise ServedError(
                f"{name}: a text that is not base64 ({error}). Encode the file's bytes."
            ) from error
    raise ServedError(f"{name}: {type(value).__name__} is no image. Give a file's bytes, or base64 of them.")


set_model(FocusClassifier())
