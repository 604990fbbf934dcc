"""The arguments of transformers' `from_pretrained` of a model that are not supported."""

from dataclasses import fields

from phi3_jax.config.model_config import Phi3Config
from phi3_jax.config.phi3small_config import SPELLING
from phi3_jax.runs.arguments import UnsupportedArgument

_devices = UnsupportedArgument("pass mesh=make_mesh(...) to divide the model; without it one device has all")
_quantized = UnsupportedArgument(
    'pass quantization="int8" or "int4"; a quantized checkpoint needs no argument', (False,)
)

UNSUPPORTED: dict[str, UnsupportedArgument] = {
    **dict.fromkeys(("device_map", "device_mesh", "tp_plan", "tp_size", "distributed_config"), _devices),
    **dict.fromkeys(("max_memory", "offload_folder", "offload_state_dict"), _devices),
    "offload_buffers": UnsupportedArgument(_devices.advice, (False,)),
    **dict.fromkeys(("quantization_config", "load_in_4bit", "load_in_8bit"), _quantized),
    "low_cpu_mem_usage": UnsupportedArgument("", (True, False)),
    "trust_remote_code": UnsupportedArgument("", (True, False)),
    "use_cache": UnsupportedArgument("", (True, False)),  # here each call says so
    "use_safetensors": UnsupportedArgument("weights are read as safetensors or GGUF only", (True,)),
    "use_kernels": UnsupportedArgument("choose with attn_implementation", (False,)),
    "weights_only": UnsupportedArgument("", (True, False)),
    "from_tf": UnsupportedArgument("save it as safetensors with transformers first", (False,)),
    "from_flax": UnsupportedArgument("save it as safetensors with transformers first", (False,)),
    "output_loading_info": UnsupportedArgument("tensors that do not fit are errors or warnings", (False,)),
    "state_dict": UnsupportedArgument("save it as safetensors, and give the directory"),
    "key_mapping": UnsupportedArgument("rename the tensors in the file"),
    "variant": UnsupportedArgument("give a directory with files of the usual names"),
    "subfolder": UnsupportedArgument("download the repository, and give the subfolder's path", ("",)),
    "gguf_file": UnsupportedArgument("give the path of the file itself"),
    "generation_config": UnsupportedArgument("set model.generation_config after loading"),
    "adapter_kwargs": UnsupportedArgument("load adapters with phi3_jax.lora", ({},)),
    "force_download": UnsupportedArgument("remove the folder from the Hub's cache", (False,)),
    "proxies": UnsupportedArgument("set HTTPS_PROXY", ({},)),
}

_families: tuple[type[Phi3Config], ...] = (Phi3Config, *Phi3Config.families.values())
CONFIG_FIELDS = tuple(
    dict.fromkeys([*(field.name for family in _families for field in fields(family)), *SPELLING])
)
"""Names that change the config."""
