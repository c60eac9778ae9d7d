"""Says why a model cannot be loaded, in sentences that name what the operator has set."""

from __future__ import annotations

from img2img_server.engine.family import ModelError
from img2img_server.errors import OperatorError
from img2img_server.setting_names import variable
from img2img_server.settings import Settings, SettingsError


def explain_load_error(settings: Settings, error: Exception) -> OperatorError:
    """Returns the error with which a worker ends if its model cannot be loaded.

    Args:
        settings: Those of the model. Their origin names the places of values.
    """
    explain = settings.origin.explain
    if isinstance(error, ModelError):
        return SettingsError(explain(error.mistake))
    if isinstance(error, SettingsError):
        return SettingsError(*map(explain, error.mistakes))
    if isinstance(error, OperatorError):
        return OperatorError(explain(str(error)))
    source = settings.model or "the model inside the package"
    text = str(error)
    why = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return SettingsError(explain(f"{variable('model')}: cannot load {source}: {why}"))
