"""The settings of a run that trains given adapters further: those of the adapters."""

from typing import Any

from phi3_jax.errors import UserError
from phi3_jax.lora.adapters import own_names, projections
from phi3_jax.lora.peft_config import AdapterConfig
from phi3_jax.model import Phi3PreTrainedModel

from .settings import Settings


def with_adapter_settings(settings: Settings, adapter: AdapterConfig, model: Phi3PreTrainedModel) -> Settings:
    """Returns the settings with the rank and the other numbers of the adapters.

    Raises:
        UserError: a setting is given and the adapters have another value.
    """
    fields, names = adapter.fields, own_names(model.config)
    adapted = {name.rpartition(".")[2] for name, _ in projections(model) if adapter.targets(name)}
    own: dict[str, Any] = {
        "lora_rank": fields["r"],
        "lora_alpha": float(fields["lora_alpha"]),
        "use_rslora": adapter.rslora,
        "use_dora": adapter.dora,
        "lora_dropout": adapter.dropout,
        "lora_targets": [name for name in names.values() if name in adapted],
    }
    for name in sorted(own.keys() & settings.model_fields_set):
        given = getattr(settings, name)
        same = given == own[name]
        if name == "lora_targets":
            same = {names.get(each, each) for each in given} == adapted
        if not same and given is not None:
            raise UserError(
                f"{name}={given!r}, and {adapter.path} has {own[name]!r}, with which the adapters are "
                f"trained; leave {name} out"
            )
    return settings.model_copy(update=own)
