"""The registered model as MLflow runs it; MLflow keeps this file as the model's code and loads that copy."""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext

from medfocus.serve import Predictor


class FocusClassifier(PythonModel):
    """Raw picture bytes in, class probabilities and the mask overlay out."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the model folder that was logged as the artefact ``model``."""
        self.predictor = Predictor.load(Path(context.artifacts["model"]))

    def predict(  # pyright: ignore[reportIncompatibleMethodOverride]  # MLflow's own returns None
        self,
        context: PythonModelContext,
        model_input: pd.DataFrame,
        params: dict[str, Any] | None = None,
    ) -> pd.DataFrame:
        """Column ``picture`` of encoded pictures, bytes or base64 text -> one row a picture.

        The columns are label, probability_<class> for every class, mask_status, mask_score and
        overlay (PNG in base64). Raises ValueError naming the picture's place in the batch.
        """
        values = model_input["picture"].tolist()
        pictures = [_bytes(v, f"picture {i + 1} of {len(values)}") for i, v in enumerate(values)]
        rows = [
            {
                "label": prediction.label,
                **{f"probability_{name}": p for name, p in prediction.probabilities.items()},
                "mask_status": prediction.mask_status,
                "mask_score": prediction.mask_score,
                "overlay": base64.b64encode(prediction.overlay).decode(),
            }
            for prediction in self.predictor.predict(pictures)
        ]
        return pd.DataFrame(rows)


def _bytes(value: object, name: str) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise ValueError(
                f"{name}: a text that is not base64 ({error}). Encode the file's bytes."
            ) from error
    raise ValueError(f"{name}: {type(value).__name__} is no picture. Give a file's bytes, or base64 of them.")


set_model(FocusClassifier())
