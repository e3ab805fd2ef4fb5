"""The whole quantized model is trained to predict what the original predicts, with the memory of one block.

The loss is the Kullback-Leibler divergence from the original's next-token distribution: unlike the loss on the text, it
teaches the model nothing about the calibration text, only to be itself again. Gradients stream block by block and are
used up by the optimizer at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from requant.progress import track
from requant.quantizers.learned import LearnedRounding
from requant.quantizers.rescaled import Rescaled
from requant.sensitivity.store import Stores, TensorStore
from requant.sensitivity.streaming import streamed_gradients
from requant.settings import Distillation
from requant.tuning.adam import StreamedAdam

TOKENS_AT_ONCE = 256  # whose logits are held at a time
HELD_OUT = 4  # windows, of a text that has eight times as many

Lesson = tuple[torch.Tensor, torch.Tensor]  # token ids int64 [1, T], their final state [1, T, C] in the original model


class Lessons(NamedTuple):
    """What to train on, in order, and what tells whether it helped: windows of one length."""

    train: Sequence[Lesson]
    held_out: Sequence[Lesson]


@dataclass(frozen=True)
class Gain:
    """The divergence from the original's predictions on windows that were not trained on, in nats a token. What does
    not get less is not kept."""

    before: float
    after: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"kept": self.kept}

    @property
    def kept(self) -> bool:
        return self.after < self.before


def rate_of(kind: str, rounding: LearnedRounding | Rescaled, settings: Distillation) -> float:
    """The full rate of a rounding's parameter: its offset, its sparse values, ends of its ranges or its steps."""
    if kind == "offset":
        return settings.rate
    if kind == "values":
        return settings.value_rate * rounding.mean_step
    return settings.range_rate * 4 / rounding.scheme.levels


def draws(there: int, count: int, seed: int) -> tuple[list[int], list[int]]:
    """Of ``there`` windows (two at least) ``count`` to train on, none again before all others, and those held out."""
    generator = torch.Generator().manual_seed(seed)
    order, held = torch.randperm(there, generator=generator), min(HELD_OUT, -(-there // 8))
    rounds = [order[held + torch.randperm(there - held, generator=generator)] for _ in range(0, count, there - held)]
    return torch.cat([order[:0], *rounds])[:count].tolist(), order[:held].tolist()


def final_state(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """What ``model`` hands to its output head: token ids int64 [B, T] -> [B, T, C]."""
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def logits(model: PreTrainedModel, state: torch.Tensor) -> torch.Tensor:
    """What ``model`` makes of its final states [..., C]: fp32 [..., V]."""
    made = model.get_output_embeddings()(state).float()
    config = model.config.get_text_config()
    if scale := getattr(config, "logit_scale", None):  # Cohere
        made = made * scale
    if divisor := getattr(config, "logits_scaling", None):  # Granite
        made = made / divisor
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma
        made = cap * torch.tanh(made / cap)
    return made


def divergence(student: torch.Tensor, teacher: torch.Tensor, model: PreTrainedModel) -> tuple[float, torch.Tensor]:
    """Mean over tokens of KL(teacher || student) in nats of ``model``'s predictions, and its gradient by ``student``.

    student, teacher: final states [B, T, C]. Logits exist for TOKENS_AT_ONCE tokens at a time.
    """
    leaf = student.detach().flatten(0, 1).requires_grad_()
    target, tokens, total = teacher.flatten(0, 1), leaf.shape[0], 0.0
    for start in range(0, tokens, TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        with torch.no_grad():
            expected = logits(model, target[part]).log_softmax(-1)
        predicted = logits(model, leaf[part]).log_softmax(-1)
        loss = kl_div(predicted, expected, reduction="sum", log_target=True) / tokens
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    assert leaf.grad is not None
    return total, leaf.grad.view_as(student)


def distill(
    model: PreTrainedModel,
    blocks: Sequence[nn.Module],
    roundings: Mapping[str, LearnedRounding | Rescaled],
    lessons: Lessons,
    settings: Distillation,
    *,
    stores: Stores = TensorStore,
) -> Gain:
    """Trains ``roundings``, with which the linear layers of ``blocks`` compute, unless that is for nothing.

    lessons: each step takes the next ``batch`` of those to train on. stores: for the optimizer's moments.
    """
    parameters, rates = dict[str, nn.Parameter](), dict[str, float]()
    for layer, rounding in roundings.items():
        for kind, parameter in rounding.named_parameters():
            parameters[f"{layer}.{kind}"] = parameter
            rates[f"{layer}.{kind}"] = rate_of(kind, rounding, settings)
    adam = StreamedAdam(parameters, rates, stores(), stores())
    earlier, before = {name: one.detach().clone() for name, one in parameters.items()}, _mean(model, lessons.held_out)
    with streamed_gradients(blocks, parameters, adam.update):
        for step in track(range(settings.steps), settings.steps, "training through the whole model"):
            adam.begin_step(settings.share(step))
            chosen = lessons.train[step * settings.batch : (step + 1) * settings.batch]
            ids, teacher = (torch.cat([one[side] for one in chosen]).to(model.device) for side in (0, 1))
            student = final_state(model, ids)
            _, gradient = divergence(student, teacher, model)
            student.backward(gradient)  # type: ignore[no-untyped-call]
            for rounding in roundings.values():
                rounding.project()
    gain = Gain(before, _mean(model, lessons.held_out))
    if not gain.kept:
        for name, parameter in parameters.items():
            parameter.detach().copy_(earlier[name])
    return gain


def _mean(model: PreTrainedModel, lessons: Sequence[Lesson]) -> float:
    """Divergence over ``lessons``."""
    total = 0.0
    for ids, teacher in lessons:
        with torch.no_grad():
            student = final_state(model, ids.to(model.device))
        total += divergence(student, teacher.to(model.device), model)[0]
    return total / len(lessons)
