"""A whole training step as one CUDA graph: forward, backward, clipping, optimiser and running average.

A step of these codecs is some thousands of small kernels, and a processor needs longer to launch them one by one than an
accelerator to run them. Captured once, they replay without it. That asks for fixed shapes, for no look at a result on the
way, and for optimisers that keep their state on the device: parameters, gradients, moments and averages are each one flat
tensor here, so that Adam, the clipping and the average are a handful of kernels, and Muon's matrices of about the same size
are orthogonalised together, padded with zeros (which leave the result as it is). On a CPU the same step runs uncaptured.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..codecs.base import ImageCodec
from .optim import Muon, orthogonalise

WARM_UP = 4  # steps before the capture, in which libraries choose their algorithms; weights are put back afterwards
BUCKET_ROWS, BUCKET_COLUMNS = 32, 128  # sizes of matrices are rounded up to multiples of these
COMPILED = {"": (), "transforms": ("g_a", "g_s"), "all": ("g_a", "g_s", "latent")}
"""What ``torch.compile`` takes. Two thirds of the kernels of a step are small ones of the entropy model: with it mlicv2 trained
on 165 million pixels a second of an H200 in the place of 120, but nearly two minutes passed before its first step. What learns
in a hard stage is another graph, and the stage over before the entropy model is compiled anew: the loop leaves it out there.
"""


def _flat_view(flat: Tensor, at: int, p: Tensor) -> Tensor:
    """The part of ``flat`` from ``at`` on in the shape of ``p``, kernels with their channels last in memory."""
    part = flat[at : at + p.numel()]
    if p.ndim == 4:
        o, i, h, w = p.shape
        return part.view(o, h, w, i).permute(0, 3, 1, 2)
    return part.view(p.shape)


class Step:
    """``step(x, level, factor, decay)`` trains once on x (B, 3, h, w) at level (B,); -> figures, device scalars by name.

    ``codec`` and ``ema`` must be on their device; ``optimisers`` (those of ``optim.optimisers``) say what moves how fast, and
    are not used themselves; ``compiled`` says what is, see ``COMPILED``. The shapes of the first call are those of all: other
    shapes, or other parts that rest, want another Step that takes the ``state_dict`` of this one.
    """

    def __init__(self, codec: ImageCodec, ema: ImageCodec, optimisers: list[torch.optim.Optimizer], recipe: Any,
                 objective: Any, compiled: str = ""):  # fmt: skip
        self.codec, self.recipe, self.objective = codec, recipe, objective
        self.device = next(codec.parameters()).device
        names = {id(p): n for n, p in codec.named_parameters()}
        groups = [(isinstance(kind, Muon), group) for kind in optimisers for group in kind.param_groups]
        groups.sort(key=lambda g: g[0])  # Adam's first
        self.settings = dict(groups)  # of either kind; alike in all its groups but for the rates
        ordered = [(p, muon, group["peak"]) for muon, group in groups for p in group["params"]]
        self.params = [p for p, *_ in ordered]
        n = sum(p.numel() for p in self.params)
        self.adam = sum(p.numel() for p, muon, _ in ordered if not muon)  # see above
        new = {"device": self.device, "dtype": torch.float32}
        self.p, self.g, self.average = (torch.zeros(n + 1, **new) for _ in range(3))  # the last place is padding's
        self.momentum = torch.zeros(n - self.adam + 1, **new)
        self.first, self.second = torch.zeros(self.adam, **new), torch.zeros(self.adam, **new)
        self.count = torch.zeros((), **new)
        self.trained = torch.zeros(n, **new)
        self.adam_rate = torch.zeros(self.adam, **new)
        self.factor, self.decay = torch.zeros((), **new), torch.zeros((), **new)
        averages = dict(ema.named_parameters())
        matrices: dict[tuple[int, int], list[tuple[Tensor, float]]] = {}
        at = 0
        self.grads: list[Tensor] = []
        with torch.no_grad():
            for p, muon, rate in ordered:
                average = averages[names[id(p)]]
                for flat, tensor in ((self.p, p), (self.average, average)):
                    view = _flat_view(flat, at, p)
                    view.copy_(tensor)
                    tensor.data = view
                self.grads.append(_flat_view(self.g, at, p))
                self.trained[at : at + p.numel()] = float(p.requires_grad)
                if muon:
                    index = (at - self.adam + torch.arange(p.numel(), device=self.device)).view(len(p), -1)
                    scale = rate * self.settings[True]["rms"] * max(index.shape) ** 0.5
                    index = index.T if index.shape[0] > index.shape[1] else index
                    rows, columns = (-(-s // b) * b for s, b in zip(index.shape, (BUCKET_ROWS, BUCKET_COLUMNS)))
                    padded = index.new_full((rows, columns), n - self.adam)
                    padded[: index.shape[0], : index.shape[1]] = index
                    matrices.setdefault((rows, columns), []).append((padded, scale))
                else:
                    self.adam_rate[at : at + p.numel()] = rate
                at += p.numel()
        self.buckets = [(torch.stack([i for i, _ in parts]),
                         torch.tensor([s for _, s in parts], **new)[:, None, None]) for parts in matrices.values()]  # fmt: skip
        self.graph: Any = None
        for name in COMPILED["all"]:
            part = codec.get_submodule(name)
            if name in COMPILED[compiled]:
                part.compile()
            else:
                part._compiled_call_impl = None  # of a Step before; torch has no public way back

    def state_dict(self) -> dict[str, Tensor]:
        """Moments; parameters and averages are the codecs' own."""
        return {"momentum": self.momentum, "first": self.first, "second": self.second, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])

    def _once(self) -> None:
        recipe = self.recipe
        half = torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if self.device.type == "cuda" else nullcontext()
        with half:
            loss, figures = self.objective(self.codec, self.x, self.level, recipe, 0.0, None)
        trained = [p for p in self.params if p.requires_grad]
        found = torch.autograd.grad(loss, trained, allow_unused=True)
        with torch.no_grad():
            self.g.zero_()
            views = [v for v, p in zip(self.grads, self.params) if p.requires_grad]
            pairs = [(v, g) for v, g in zip(views, found) if g is not None]
            torch._foreach_copy_([v for v, _ in pairs], [g.to(torch.float32) for _, g in pairs])
            norm = self.g.norm()
            # a step whose gradient is not finite is one of a zero gradient
            g = torch.where(norm.isfinite(), self.g * (recipe.clip / (norm + 1e-6)).clamp_max(1.0), 0.0)
            self._adam(g[: self.adam])
            self._muon(g[self.adam :])
            self.average.lerp_(self.p, 1 - self.decay)
            names = ("loss", *figures, "grad_norm")
            values = torch.stack([loss.detach(), *(v.mean() for v in figures.values()), norm])
        self.figures = names, values

    def _adam(self, g: Tensor) -> None:
        if not self.adam:
            return
        a, b = self.settings[False]["betas"]
        self.count += 1
        self.first.lerp_(g, 1 - a)
        self.second.mul_(b).addcmul_(g, g, value=1 - b)
        first = self.first / (1 - a**self.count)
        second = (self.second / (1 - b**self.count)).sqrt_().add_(self.settings[False]["eps"])
        self.p[: self.adam] -= self.factor * self.adam_rate * self.trained[: self.adam] * first / second

    def _muon(self, g: Tensor) -> None:
        if not self.buckets:
            return
        keep = self.settings[True]["momentum"]
        self.momentum.mul_(keep).add_(g)
        update = g + keep * self.momentum
        update[-1:].zero_()  # not ``update[-1] = 0``, which copies from the host
        result = torch.zeros_like(update)
        for index, scale in self.buckets:
            result[index] = orthogonalise(update[index]) * scale
        self.p[self.adam : -1] -= self.factor * self.trained[self.adam :] * result[:-1]

    def _capture(self) -> None:
        """Warm up, put everything back as it was, and record."""
        kept = [t.clone() for t in (self.p, self.average, *self.state_dict().values())]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self._once()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self._once()
        for tensor, before in zip((self.p, self.average, *self.state_dict().values()), kept):
            tensor.copy_(before)

    def __call__(self, x: Tensor, level: Tensor, factor: float, decay: float) -> dict[str, Tensor]:
        """``factor`` on all learning rates, ``decay`` of the running average."""
        if not hasattr(self, "x"):
            self.x, self.level = x.clone(), level.clone()
        self.x.copy_(x)
        self.level.copy_(level)
        self.factor.fill_(factor)
        self.decay.fill_(decay)
        if self.device.type != "cuda":
            self._once()
        else:
            if self.graph is None:
                self._capture()
            self.graph.replay()
        names, values = self.figures
        return dict(zip(names, values.clone().unbind()))
