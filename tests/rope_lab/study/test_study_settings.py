"""The settings of a study: what is read, and errors that name the setting."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from phi3_jax.errors import UserError
from phi3_jax.rope_lab.study.settings import StudySettings

TRAIN = {"max_steps": 10, "train_batch_size": 2}
SETTINGS: dict[str, Any] = {
    "output_dir": "out",
    "text": "book.txt",
    "length": 4096,
    "base": {
        "config": {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        "train": TRAIN,
    },
    "ropes": {"none": "none", "yarn": {"rope": "yarn:factor=8", "mixed": True}, "searched": {"search": {}}},
    "finetune": {"train": TRAIN},
    "compare": {"lengths": [256, 4096]},
}


def read(tmp_path: Path, changes: dict[str, Any]) -> StudySettings:
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(SETTINGS | changes))
    return StudySettings.read(path)


def changed(section: str, **changes: Any) -> dict[str, Any]:
    return {section: SETTINGS[section] | changes}


def test_reads_ropes_in_all_forms(tmp_path: Path) -> None:
    settings = read(tmp_path, changed("ropes", linear={"rope": "linear:factor=8", "trained": ["none"]}))
    assert {name: rope.is_mixed for name, rope in settings.ropes.items()} == {
        "none": False,
        "yarn": True,
        "searched": True,
        "linear": False,
    }
    assert settings.trained_of("yarn") == ["none", "full"]
    assert settings.trained_of("linear") == ["none"]
    assert settings.base is not None
    config = settings.base.phi3_config()
    assert (config.vocab_size, config.original_max_position_embeddings, config.eos_token_id) == (4096, 512, 0)


def test_the_configuration_of_the_repository_is_valid() -> None:
    settings = StudySettings.read(Path(__file__).parents[3] / "configs" / "rope-study-small.yaml")
    assert {"none", "linear", "ntk", "yarn", "searched"} <= settings.ropes.keys()


REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"lenght": 3}, "there is no setting lenght; did you mean length?"),
    "in a section": (
        changed("compare", length=[3]),
        "there is no setting compare.length; did you mean lengths?",
    ),
    "of a rope": (
        changed("ropes", yarn={"rope": "yarn:factor=8", "mix": True}),
        "there is no setting ropes.yarn.mix; did you mean mixed?",
    ),
    "of a search": (
        changed("ropes", searched={"search": {"knot": 3}}),
        "there is no setting ropes.searched.search.knot; did you mean knots?",
    ),
    "of training": (
        changed("finetune", train=TRAIN | {"learning_rat": 1}),
        "finetune.train: there is no setting learning_rat; did you mean learning_rate?",
    ),
    "of the study": (
        changed("finetune", train=TRAIN | {"rope": "none"}),
        "finetune.train: rope follows from the study; leave it out",
    ),
    "without steps": (changed("finetune", train={}), "finetune.train: max_steps must be given"),
    "wrong training": (
        changed("finetune", train=TRAIN | {"learning_rate": -1}),
        "finetune.train: learning_rate=-1: Input should be greater than 0",
    ),
    "config": (
        {"base": SETTINGS["base"] | {"config": {"hidden_sise": 3}}},
        "base: config: there is no field hidden_sise; did you mean hidden_size?",
    ),
    "config of the study": (
        {"base": SETTINGS["base"] | {"config": {"vocab_size": 300}}},
        "config: vocab_size follows from the study",
    ),
    "two models": ({"model": "there"}, "give either model or base, not both"),
    "unknown rope": (changed("ropes", x="lineal:factor=2"), "ropes.x: rope 'lineal:factor=2'"),
    "both": (changed("ropes", x={"rope": "none", "search": {}}), "ropes.x: give either rope or search"),
    "name": (changed("ropes", **{"a/b": "none"}), "ropes: 'a/b' names a directory"),
    "initial tokens": (changed("ropes", x="linear:factor=2,initial_tokens=4"), "no config can express"),
    "no fine-tuning": ({"finetune": None}, "trained asks for fine-tuning; give finetune, or trained: [none]"),
    "lengths": (changed("compare", lengths=[512, 256]), "compare.lengths: [512, 256] must be lengths"),
    "shares of a base": (
        changed("base", retrieval_share=0.5, repetition_share=0.5),
        "base: retrieval_share and repetition_share leave no windows of the text",
    ),
    "shares": (
        changed("finetune", short_share=0.7, retrieval_share=0.3),
        "finetune: short_share and retrieval_share leave no long windows",
    ),
    "task": ({"retrieve": {"lengths": [256], "tasks": ["pass"]}}, "is not a task; choose from passkey"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejects_wrong_settings(tmp_path: Path, case: str) -> None:
    changes, message = REJECTED[case]
    with pytest.raises(UserError) as error:
        read(tmp_path, changes)
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "study.yaml"))
    assert "\n" not in str(error.value)
