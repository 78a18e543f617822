"""Distillation losses against the published formulas in float64, and their memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tersor import TersorError
from tersor.training import LOSSES, Distillation, Head, distill, token_losses
from tersor.training.losses import Cosine, GeneralizedJS, Loss, SkewedKL, SkewedReverseKL


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * (a / b).log()).sum(-1)


def by_hand(name: str, student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """The formulas as the papers print them, with the settings that LOSSES defaults to."""
    if name == "logit_mse":
        return ((student - teacher) ** 2).mean(-1)
    if name == "cosine":
        return 1 - (student * teacher).sum(-1) / (student.norm(dim=-1) * teacher.norm(dim=-1))
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    middle = (p + q) / 2
    divergence = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "generalized_js": lambda: (kl(p, middle) + kl(q, middle)) / 2,
        "skewed_kl": lambda: kl(p, 0.1 * p + 0.9 * q),
        "skewed_reverse_kl": lambda: kl(q, 0.9 * p + 0.1 * q),
        "total_variation": lambda: (p - q).abs().sum(-1) / 2,
    }
    return divergence[name]() * temperature**2


def temperatures(name: str, *others: float) -> tuple[float, ...]:
    """1, and the others where the loss knows temperatures."""
    return (1.0, *others) if LOSSES[name].of_distributions else (1.0,)


def batch(dtype: torch.dtype = torch.float64, spread: float = 3.0) -> dict[str, Tensor]:
    """Hidden states and heads of a student and a wider teacher; 23 tokens of which 14 count."""
    torch.manual_seed(0)
    made = {
        "hidden": torch.randn(23, 12),
        "weight": torch.randn(37, 12) * spread / 12**0.5,
        "bias": torch.randn(37),
        "teacher_hidden": torch.randn(23, 20),
        "teacher_weight": torch.randn(37, 20) * spread / 20**0.5,
    }
    made = {name: tensor.to(dtype) for name, tensor in made.items()}
    labels = torch.randint(0, 37, (23,))
    labels[:5] = labels[11:15] = -100
    return made | {"labels": labels}


def whole(made: dict[str, Tensor], name: str, temperature: float, alpha: float) -> list[Tensor]:
    """The loss and its gradients by plain autograd over all logits in float64."""
    inputs = [made[n].double().requires_grad_() for n in ("hidden", "weight", "bias")]
    teacher = made["teacher_hidden"].double() @ made["teacher_weight"].double().T
    student = inputs[0] @ inputs[1].T + inputs[2]
    real = made["labels"] != -100
    losses = by_hand(name, student[real], teacher[real], temperature)
    log_q = student[real].log_softmax(-1)
    cross = -log_q[torch.arange(int(real.sum())), made["labels"][real]]
    loss = (alpha * losses + (1 - alpha) * cross).mean()
    return [loss, *torch.autograd.grad(loss, inputs)]


def fused(made: dict[str, Tensor], **settings: Any) -> list[Tensor]:
    inputs = [made[n].clone().requires_grad_() for n in ("hidden", "weight", "bias")]
    teacher = Head(made["teacher_hidden"], made["teacher_weight"])
    loss = distill(Head(*inputs), teacher, Distillation(**settings), made["labels"]).loss
    return [loss, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize(
    ("name", "temperature"), [(name, t) for name in LOSSES for t in temperatures(name, 0.7, 4.0)]
)
def test_plain_losses(name: str, temperature: float) -> None:
    torch.manual_seed(1)
    student, teacher = 4 * torch.randn(2, 9, 31, dtype=torch.float64)
    student.requires_grad_()
    wanted = by_hand(name, student, teacher, temperature)
    found = token_losses(name, student, teacher, temperature)
    assert found.shape == (9,)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    single = token_losses(name, student.float(), teacher.float(), temperature)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), wanted, rtol=1e-5, atol=1e-6)
    assert token_losses(name, student.bfloat16(), teacher.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("chunk", [1, 100, 37 * 16, 37 * 5, 1 << 20])
@pytest.mark.parametrize("name", LOSSES)
def test_pieces_are_the_whole(name: str, chunk: int) -> None:
    """Loss and gradients, whatever the pieces, are those of plain autograd."""
    made = batch()
    for temperature, alpha in ((temperatures(name, 2.0)[-1], 0.3), (1.0, 1.0)):
        wanted = whole(made, name, temperature, alpha)
        found = fused(made, loss=name, temperature=temperature, alpha=alpha, chunk=chunk)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_float32_is_accurate(name: str) -> None:
    made = batch(torch.float32)
    t = temperatures(name, 2.0)[-1]
    wanted = whole(made, name, t, 0.5)
    for a, b in zip(fused(made, loss=name, temperature=t, chunk=200), wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", [GeneralizedJS, SkewedKL, SkewedReverseKL])
@pytest.mark.parametrize("share", [0.05, 0.6])
def test_shares(kind: Any, share: float) -> None:
    torch.manual_seed(1)
    student, teacher = 4 * torch.randn(2, 9, 31, dtype=torch.float64)
    student.requires_grad_()
    p, q = teacher.softmax(-1), student.softmax(-1)
    mixed = share * p + (1 - share) * q
    wanted = {
        GeneralizedJS: share * kl(p, mixed) + (1 - share) * kl(q, mixed),
        SkewedKL: kl(p, mixed),
        SkewedReverseKL: kl(q, (1 - share) * p + share * q),
    }[kind].mean()
    found = distill(student, teacher, Distillation(kind(share), alpha=1.0)).loss
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-13)
    gradients = [torch.autograd.grad(x, student)[0] for x in (found, wanted)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LOSSES)
def test_a_student_that_is_its_teacher(name: str, dtype: torch.dtype) -> None:
    made = batch(dtype, spread=20)
    hidden, weight = made["hidden"].requires_grad_(), made["weight"].requires_grad_()
    for chunk in (90, 1 << 20):
        t = temperatures(name, 2.0)[-1]
        settings = Distillation(name, temperature=t, alpha=1.0, chunk=chunk)
        teacher = Head(hidden.detach(), weight.detach())
        loss = distill(Head(hidden, weight), teacher, settings, made["labels"]).loss
        loss.backward()
        assert loss.detach().abs() <= 1e-6
        # Cosine's zero is a difference of numbers near 1.
        bound = 1e-6 if name == "cosine" else 0.0
        for tensor in (hidden, weight):
            assert tensor.grad is not None and tensor.grad.abs().max() <= bound
            tensor.grad = None


@pytest.mark.parametrize("name", LOSSES)
def test_certain_predictions_stay_finite(name: str) -> None:
    """Logits so far apart that probabilities underflow to zero on either side."""
    teacher = torch.tensor([[200.0, -200.0, 0.0], [0.0, 200.0, -200.0]])
    student = teacher.roll(1, dims=0).requires_grad_()
    loss = distill(student, teacher, Distillation(name, alpha=1.0)).loss
    loss.backward()
    assert student.grad is not None
    assert loss.isfinite() and loss > 0.1 and student.grad.isfinite().all()


def test_logits_and_heads_agree() -> None:
    made = batch()
    student = (made["hidden"] @ made["weight"].T).requires_grad_()
    teacher = made["teacher_hidden"] @ made["teacher_weight"].T
    settings = Distillation("reverse_kl", 1.5, 0.4, chunk=150)
    parts = distill(student, teacher, settings, made["labels"])
    parts.loss.backward()
    heads = [Head(made["hidden"], made["weight"]), teacher]
    torch.testing.assert_close(parts, distill(*heads, settings, made["labels"]))
    assert student.grad is not None
    masked = made["labels"] == -100
    assert (student.grad[masked] == 0).all() and (student.grad[~masked] != 0).any(1).all()
    weighed = settings.alpha * parts.distillation + 0.6 * parts.cross_entropy
    torch.testing.assert_close(parts.loss, weighed)
    assert not parts.distillation.requires_grad and not parts.cross_entropy.requires_grad


def test_softcap() -> None:
    made = batch()
    hidden, weight = made["hidden"].requires_grad_(), made["weight"].requires_grad_()
    teacher = made["teacher_hidden"] @ made["teacher_weight"].T
    found = distill(
        Head(hidden, weight, softcap=5.0),
        teacher,
        Distillation(alpha=0.5, chunk=99),
        made["labels"],
    ).loss
    capped = 5 * (hidden @ weight.T / 5).tanh()
    wanted = distill(capped, teacher, Distillation(alpha=0.5), made["labels"]).loss
    torch.testing.assert_close(found, wanted)
    for tensor in (hidden, weight):
        gradients = [torch.autograd.grad(x, tensor, retain_graph=True)[0] for x in (found, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_scaled_losses_do_not_underflow() -> None:
    """A loss that is scaled for float16, as mixed precision does, over very many tokens."""
    made, scale, count = batch(torch.float16), 2.0**16, 10.0**6
    names = ("hidden", "weight", "teacher_hidden", "teacher_weight")

    def gradients(dtype: torch.dtype) -> list[Tensor]:
        hidden, weight, *teacher = (made[name].to(dtype, copy=True) for name in names)
        student = Head(hidden.requires_grad_(), weight.requires_grad_())
        loss = distill(student, Head(*teacher), Distillation(), made["labels"], count).loss
        return [g.double() for g in torch.autograd.grad(loss * scale, (hidden, weight))]

    found, wanted = gradients(torch.float16), gradients(torch.float64)
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() <= 0.01 * b.norm()  # float16 has 11 bits


def test_only_the_student_learns_and_only_what_is_not_frozen() -> None:
    made = batch()
    hidden, weight = made["hidden"].requires_grad_(), made["weight"]
    teacher = Head(made["teacher_hidden"].requires_grad_(), made["teacher_weight"])
    distill(Head(hidden, weight), teacher, Distillation(), made["labels"]).loss.backward()
    assert hidden.grad is not None and weight.grad is None and teacher.hidden.grad is None


def test_accumulated_batches_are_one_batch() -> None:
    """With the count of all of them, two unequal halves add up to the whole."""
    made = batch()
    settings = Distillation(temperature=2.0)
    student = made["hidden"] @ made["weight"].T
    teacher = made["teacher_hidden"] @ made["teacher_weight"].T
    count = int((made["labels"] != -100).sum())
    halves = [
        distill(student[part], teacher[part], settings, made["labels"][part], count).loss
        for part in (slice(0, 9), slice(9, None))
    ]
    wanted = distill(student, teacher, settings, made["labels"]).loss
    torch.testing.assert_close(sum(halves), wanted)


class Largest(TorchDispatchMode):
    """Remembers the most entries that an operation gave new memory to."""

    entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage(x).data_ptr() for x in tree_leaves((args, kwargs)) if tensor(x)}
        for made in filter(tensor, tree_leaves(result)):
            if storage(made).data_ptr() not in given:
                self.entries = max(self.entries, storage(made).nbytes() // made.itemsize)
        return result


def tensor(x: object) -> bool:
    return isinstance(x, Tensor)


def storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()


@pytest.mark.parametrize("loss", [kind() for kind in LOSSES.values()])
def test_memory_is_that_of_a_chunk(loss: Loss) -> None:
    """No tensor is larger than a chunk, or than the hidden states and the head themselves."""
    torch.manual_seed(0)
    tokens, vocabulary, features, chunk = 600, 3000, 4, 16 * 500
    hidden = torch.randn(tokens, features, requires_grad=True)
    weight = torch.randn(vocabulary, features, requires_grad=True)
    teacher = Head(torch.randn(tokens, features), torch.randn(vocabulary, features))
    labels = torch.randint(0, vocabulary, (tokens,))
    with Largest() as seen:
        settings = Distillation(loss, chunk=chunk)
        distill(Head(hidden, weight), teacher, settings, labels).loss.backward()
    assert seen.entries <= max(chunk, vocabulary * features)
    with Largest() as seen, torch.no_grad():
        distill(Head(hidden, weight), teacher, settings, labels)
    assert seen.entries <= chunk  # no gradient of the head
    with Largest() as seen:
        token_losses(loss, hidden @ weight.T, hidden @ weight.T)
    assert seen.entries == tokens * vocabulary  # so the count sees what it should


def test_refusals() -> None:
    logits, labels = torch.randn(4, 9), torch.tensor([1, 2, -100, 3])
    other, settings = torch.randn(4, 10), Distillation()
    with pytest.raises(TersorError, match="vocabulary has 9 tokens and the teacher's 10"):
        distill(logits, other, settings, labels)
    with pytest.raises(TersorError, match="predicts 4 tokens and the teacher 3"):
        distill(logits, logits[:3], settings, labels)
    with pytest.raises(TersorError, match="a batch flattened"):
        distill(logits, logits[None], settings, labels)
    with pytest.raises(TersorError, match="no token counts"):
        distill(logits, logits, settings, torch.full((4,), -100))
    with pytest.raises(TersorError, match="label 9 is not in the vocabulary"):
        distill(logits, logits, settings, torch.tensor([1, 9, -100, 3]))
    with pytest.raises(TersorError, match=r"labels are \[3\] for 4 tokens"):
        distill(logits, logits, settings, labels[:3])
    with pytest.raises(TersorError, match="cross-entropy needs labels"):
        distill(logits, logits, settings)
    with pytest.raises(TersorError, match="do not fit a head"):
        Head(torch.randn(4, 3), torch.randn(9, 5))
    with pytest.raises(TersorError, match="of one vocabulary"):
        token_losses("forward_kl", logits, other)
    with pytest.raises(TersorError, match="changes nothing in Cosine"):
        token_losses("cosine", logits, logits, 2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "kl"}, "no loss 'kl'; choose one of forward_kl"),
        ({"loss": SkewedKL}, "is no loss"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": -1.0}, "above 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"loss": "logit_mse", "temperature": 2.0}, "2.0 and changes nothing in LogitMSE"),
        ({"loss": Cosine(), "temperature": 0.5}, "0.5 and changes nothing in Cosine"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"chunk": 0}, "chunk is 0"),
    ],
)
def test_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(TersorError, match=message):
        Distillation(**settings)
    with pytest.raises(TersorError, match="use forward_kl or reverse_kl"):
        GeneralizedJS(0.0)
    with pytest.raises(TersorError, match="the skew is 1"):
        SkewedKL(1.0)
