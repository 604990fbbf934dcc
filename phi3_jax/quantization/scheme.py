"""The user's choice of how weights, and the activations that they multiply, are quantized."""

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from phi3_jax.errors import UserError

FLOATS = "none"
"""The name of no quantization, which turns a quantized checkpoint into floats."""

VOCABULARY = ("embed_tokens", "lm_head")
"""The modules with a row for every token."""

HEADS = ("score", "classifier")
"""Small heads, which are always left as they are."""


class WeightForm(NamedTuple):
    """What a checkpoint's headers tell about a quantized weight."""

    bits: int
    """4 or 8."""
    groups: int
    """The number of groups of inputs."""
    has_zero: bool = False
    """Whether each group has a zero point."""
    has_order: bool = False
    """Whether the inputs are stored in another order."""
    is_float: bool = False
    """Whether the values are float8_e4m3fn."""
    int8_activations: bool = False
    """Whether its product rounds activations to int8."""


@dataclass(frozen=True)
class Quantization:
    """How the weights of a model, and the activations that they multiply, are quantized.

    Raises:
        UserError: a field has a value that it cannot have.
    """

    bits: int = 8
    """8 or 4."""
    group_size: int | None = None
    """The number of consecutive inputs that share a scale; None: all inputs of an output."""
    symmetric: bool = True
    """Whether zero is always the integer 0; otherwise each group has a zero point of its own."""
    skip: tuple[str, ...] = VOCABULARY
    """The modules that are left as they are, by the last part of their names."""
    activations: str | None = None
    """"int8": products round each row of activations to int8 (W8A8); None: activations stay floats."""

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise UserError(f"bits={self.bits} of a quantization must be 8 or 4")
        if self.group_size is not None and (self.group_size < 8 or self.group_size % 8):
            raise UserError(f"group_size={self.group_size} of a quantization must be a multiple of 8")
        if self.activations not in (None, "int8"):
            raise UserError(f"activations={self.activations!r} of a quantization must be 'int8' or None")
        if self.activations and (self.bits != 8 or self.group_size is not None or not self.symmetric):
            raise UserError(
                "activations=int8 of a quantization needs bits=8, group_size=none and symmetric=true, not "
                f"bits={self.bits}, group_size={_text(self.group_size)}, symmetric={_text(self.symmetric)}; "
                "use int8:activations=int8"
            )

    @classmethod
    def parse(cls, quantization: "Quantization | str") -> "Quantization":
        """Returns the quantization that a text names, such as "int8" or "int4:group_size=32,symmetric=false".

        Raises:
            UserError: it cannot be read, or a field cannot have this value.
        """
        if isinstance(quantization, Quantization):
            return quantization
        name, _, rest = quantization.partition(":")
        if name not in NAMED:
            raise UserError(f"quantization {quantization!r} is not known; use {' or '.join(NAMED)}")
        changes: dict[str, Any] = {}
        for part in filter(None, rest.split(",")):
            key, _, value = part.partition("=")
            if key not in _READERS:
                known = ", ".join(_READERS)
                raise UserError(f"quantization {quantization!r}: {key!r} is not known; use {known}")
            try:
                changes[key] = _READERS[key](value)
            except (ValueError, KeyError):
                raise UserError(
                    f"quantization {quantization!r}: {key}={value!r} cannot be read; write {_EXAMPLES[key]}"
                ) from None
        return replace(NAMED[name], **changes)

    def __str__(self) -> str:
        """Returns the text that `parse` reads."""
        name = f"int{self.bits}"
        changes = [
            f"{field.name}={_text(getattr(self, field.name))}"
            for field in fields(self)
            if field.name in _READERS and getattr(self, field.name) != getattr(NAMED[name], field.name)
        ]
        return f"{name}:{','.join(changes)}" if changes else name

    def includes(self, name: str) -> bool:
        """Whether the module of this name is quantized."""
        return name.rpartition(".")[2] not in (*self.skip, *HEADS)

    def form(self, name: str, inputs: int) -> WeightForm:
        """Returns the form of a weight with this name and so many inputs.

        An embedding multiplies no activations; those of a tied head stay floats.

        Raises:
            UserError: the groups do not divide the inputs.
        """
        size = self.group_size or inputs
        if inputs % size:
            fitting = [n for n in range(8, inputs + 1, 8) if inputs % n == 0]
            near = sorted(sorted(fitting, key=lambda n: abs(n - size))[:4])
            raise UserError(
                f"{name} has {inputs} inputs, which groups of {size} do not divide; use group_size="
                f"{' or '.join(map(str, near)) or 'none'}"
            )
        is_embedding = name.removesuffix(".weight").endswith("embed_tokens")
        return WeightForm(
            bits=self.bits,
            groups=inputs // size,
            has_zero=not self.symmetric,
            int8_activations=self.activations == "int8" and not is_embedding,
        )


NAMED = {"int8": Quantization(), "int4": Quantization(bits=4, group_size=64)}
"""The quantizations that have a name."""

_READERS: dict[str, Any] = {
    "group_size": lambda text: None if text == "none" else int(text),
    "symmetric": {"true": True, "false": False}.__getitem__,
    "skip": lambda text: tuple(part for part in text.split("+") if part != "none"),
    "activations": {"int8": "int8", "none": None}.__getitem__,
}
_EXAMPLES = {
    "group_size": "group_size=128 or none",
    "symmetric": "symmetric=true or false",
    "skip": "skip=lm_head or none",
    "activations": "activations=int8 or none",
}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "+".join(value) or "none"
    return str(value).lower()
