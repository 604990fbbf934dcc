"""The model `phi3_jax` of EleutherAI's lm-eval.

Versions of lm-eval with plugins load it through this package's entry point: `lm_eval --model phi3_jax ...`.
For older versions, up to 0.4.13, this module is the same command: `python -m phi3_jax.lm_eval
--model phi3_jax --model_args pretrained=DIRECTORY --tasks ...`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from phi3_jax.batch import Engine
from phi3_jax.batch.requests import BadRequestError
from phi3_jax.checkpoint.default_model import default_model
from phi3_jax.config.rope_argument import parse_rope
from phi3_jax.errors import UserError
from phi3_jax.evaluation.score_all import Part, score_all
from phi3_jax.evaluation.scorer import Scorer
from phi3_jax.lora import find_model, open_model
from phi3_jax.parallel.sharding import make_mesh
from phi3_jax.pipeline import Pipeline

SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""The options of a task that the engine takes too."""


@register_model("phi3_jax")
class Phi3JaxLM(TemplateLM):
    """A checkpoint for lm-eval; it scores in batches of similar length and answers by continuous batching.

    Args:
        pretrained: a directory, a GGUF file or a hub name; default: the default model.
        peft: LoRA adapters in PEFT's format, a directory or a hub name; without `pretrained` they name the
            base model.
        dtype: the dtype of parameters and activations.
        rope: a rope scaling that replaces the model's, in the form of `parse_rope`. With several parameters,
            use @FILE: lm-eval splits model_args at commas.
        max_length: the most tokens of a request; default: the model's context.
        max_gen_toks: the most tokens of an answer for tasks without their own.
        batch_size: the requests that are answered at a time; "auto" or 1, lm-eval's default: by memory.
        mesh: the mesh to divide the model over, such as "fsdp=8" (or, for several axes, "fsdp=4;tensor=2").
    """

    def __init__(
        self,
        pretrained: str | None = None,
        dtype: str = "bfloat16",
        rope: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        batch_size: int | str | None = None,
        mesh: str | None = None,
        peft: str | None = None,
        **unused: Any,
    ):
        super().__init__()
        if unknown := sorted(unused.keys() - {"device", "max_batch_size"}):
            raise UserError(f"phi3_jax takes no {', '.join(unknown)} in model_args")
        paths = find_model(pretrained, peft, default_model)
        checkpoint = open_model(paths)
        config = None if rope is None else parse_rope(rope).config_to_save(checkpoint.config)
        where = None if mesh is None else make_mesh(mesh.replace(";", ","))
        pipeline = Pipeline.load(checkpoint, dtype=dtype, mesh=where, config=config, adapter=paths.adapter)
        self._pipeline, self.tokenizer = pipeline, pipeline.tokenizer
        self._name = str(peft or pretrained or paths.base)
        self._scorer = Scorer(pipeline.compiled)
        self.max_length = max_length or self._scorer.config.context_length
        self.max_gen_toks = max_gen_toks
        self._slots = None if batch_size in (None, "auto", 1, "1") else int(batch_size)

    @property
    def eot_token_id(self) -> int:
        token = self.tokenizer.eos_token_id
        if token is None:
            raise UserError(f"the tokenizer of {self._name} has no end token")
        return token

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self._name.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = bos is None or not string.startswith(bos)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """The model is not fed the last token, so the tokens may be one more than the context has."""
        parts = []
        for _key, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens must have 1 to {self.max_length}, the "
                    "model's context"
                )
            tokens = np.asarray([*context, *continuation][-(self.max_length + 1) :], np.int32)
            parts.append(Part(tokens, len(tokens) - len(continuation), len(tokens) - 1))
        results: list[tuple[float, bool]] = [(0.0, False)] * len(parts)
        scores = score_all(self._scorer, parts, self._scorer.config)
        for number, each in tqdm(scores, total=len(parts), disable=disable_tqdm, desc="Scoring"):
            results[number] = -each.loss, bool(each.greedy.all())
            if (key := requests[number][0]) is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[number])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        windows: list[tuple[None, list[int], list[int]]] = []
        request_numbers: list[int] = []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                request_numbers.append(number)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (score, _) in zip(request_numbers, scores, strict=True):
            totals[number] += score
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        until: list[Any] = []
        lines: list[dict[str, Any]] = []
        for number, request in enumerate(requests):
            text, task_options = request.args
            options = normalize_gen_kwargs(task_options, self.max_gen_toks)
            until.append(options["until"])
            new = min(options["max_gen_toks"], self.max_length - 1)
            line = {"id": number, "prompt": self._prompt(text, new), "max_new_tokens": new}
            line |= {name: options[name] for name in SAMPLING_OPTIONS if options.get(name) is not None}
            if not options["do_sample"]:
                line["temperature"] = 0.0
            if stop_strings := handle_stop_sequences(list(options["until"]), eos=None):
                line["stop_strings"] = stop_strings
            lines.append(line)
        results = [""] * len(requests)
        engine = Engine(
            self._pipeline.compiled, self.tokenizer, slots=self._slots, max_length=self.max_length
        )
        for answer in tqdm(engine.run(lines), total=len(lines), disable=disable_tqdm, desc="Generating"):
            if isinstance(answer, BadRequestError):
                raise UserError(f"a request of the task cannot be answered: {answer}")
            number = int(answer.id)
            results[number] = postprocess_generated_text(answer.text, until[number], None)
            self.cache_hook.add_partial("generate_until", requests[number].args, results[number])
        return results

    def _prompt(self, text: str, new: int) -> str:
        """Returns the end of a prompt that leaves room for the answer; the engine adds the special tokens."""
        bos = self.tokenizer.bos_token
        if bos is not None and self.tokenizer.add_bos_token:
            text = text.removeprefix(bos)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        room = self.max_length - new - 2
        return text if len(ids) <= room else self.tokenizer.decode(ids[-room:])


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
