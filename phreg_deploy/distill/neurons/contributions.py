"""What each hidden unit and attention head contributes to the outlier tokens of a model.

Let x be an outlier token after a block, and m the mean of the ordinary tokens there. x - m is a sum over all units and
heads of what each wrote beyond its mean on ordinary tokens. The share of one of them is the projection of that part on
x - m, divided by the squared length of x - m. Shares are averaged over outlier tokens; over everything that writes,
they add up to 1. B batch, N patch tokens, T chosen tokens, C width, I inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from phreg_deploy.distill.neurons.neuron import RegisterNeuron
from phreg_deploy.models import hooks
from phreg_deploy.models.hooks import ViT


@dataclass(frozen=True)
class HeadShare:
    """An attention head and its mean share of the outlier tokens' deviation."""

    block: int
    head: int
    share: float


class _Writer:
    """A linear layer that writes into the residual stream: ``fc2``, or the projection of attention.

    ``weight`` ``(C, I)`` includes LayerScale. ``mean`` ``(I,)``: sum of the inputs over ordinary tokens. ``share``
    ``(I,)``: sum of shares over outlier tokens.
    """

    def __init__(self, linear: ViT, gamma: torch.Tensor | None) -> None:
        weight = linear.weight.detach().float()
        self.linear = linear
        self.weight = weight if gamma is None else weight * gamma.detach().float()[:, None]
        self.mean, self.share = weight.new_zeros(weight.shape[1]), weight.new_zeros(weight.shape[1])


class _HiddenLayer(_Writer):
    """The writer of an MLP. Activations are those in front of an inner norm, which ``fc2`` does not see.

    ``elsewhere`` ``(I,)``: sum of magnitudes over ordinary tokens. ``positive`` and ``fired`` ``(I,)``: sums of
    positive shares, and of positive share times activation, over outlier tokens.
    """

    def __init__(self, linear: ViT, gamma: torch.Tensor | None) -> None:
        super().__init__(linear, gamma)
        self.elsewhere, self.positive, self.fired = (torch.zeros_like(self.mean) for _ in range(3))


class Contributions:
    """Contributions to the outlier tokens after ``block``. Every batch passes ``add_ordinary``, then ``add_outliers``.

    ``outliers``, the argument of both, is bool ``(B, N)``.
    """

    def __init__(self, model: ViT, block: int) -> None:
        self.model, self.block = model, block
        blocks = model.blocks[: block + 1]
        self.mlps = [_HiddenLayer(b.mlp.fc2, layer_scale(b, 2)) for b in blocks]
        self.attentions = [_Writer(b.attn.proj, layer_scale(b, 1)) for b in blocks]
        self.mean = self.mlps[0].weight.new_zeros(model.embed_dim)
        self.ordinary = self.outliers = 0

    def add_ordinary(self, batch: torch.Tensor, outliers: torch.Tensor) -> None:
        """Add what ordinary tokens carry."""

        def add_inputs(writer: _Writer, inputs: torch.Tensor) -> None:
            writer.mean += inputs.sum(0)

        def add_hidden(layer: _HiddenLayer, hidden: torch.Tensor) -> None:
            layer.elsewhere += hidden.abs().sum(0)

        self.mean += self._read(batch, ~outliers, add_inputs, add_hidden).sum(0)
        self.ordinary += int((~outliers).sum())

    def add_outliers(self, batch: torch.Tensor, outliers: torch.Tensor) -> None:
        """Add what outlier tokens carry beyond the mean of ordinary ones."""
        inputs: dict[_Writer, torch.Tensor] = {}
        hidden: dict[_HiddenLayer, torch.Tensor] = {}
        out = self._read(batch, outliers, inputs.__setitem__, hidden.__setitem__)
        deviation = out - self.mean / self.ordinary  # (T, C)
        deviation = deviation / deviation.square().sum(-1, keepdim=True)
        self.outliers += len(out)
        for writer, values in inputs.items():
            share = (values - writer.mean / self.ordinary) * (deviation @ writer.weight)  # (T, I)
            writer.share += share.sum(0)
            if isinstance(writer, _HiddenLayer):
                positive = share.clamp(min=0)
                writer.positive += positive.sum(0)
                writer.fired += (positive * hidden[writer]).sum(0)

    def _read(
        self,
        batch: torch.Tensor,
        chosen: torch.Tensor,
        take_inputs: Callable[[_Writer, torch.Tensor], None],
        take_hidden: Callable[[_HiddenLayer, torch.Tensor], None],
    ) -> torch.Tensor:
        """Run the model; returns the chosen patch tokens after the block, ``(T, C)`` float32.

        Calls ``take_inputs`` with every writer's inputs and ``take_hidden`` with every MLP's hidden units, ``(T, I)``.
        """
        prefix, found = self.model.num_prefix_tokens, []

        def pick(tokens: torch.Tensor) -> torch.Tensor:
            return tokens[:, prefix:][chosen].float()

        def on_hidden(i: int, hidden: torch.Tensor) -> None:
            if i <= self.block:
                take_hidden(self.mlps[i], pick(hidden))

        def on_output(i: int, out: torch.Tensor) -> None:
            if i == self.block:
                found.append(pick(out))

        with ExitStack() as stack:
            stack.enter_context(hooks.hidden_units(self.model, on_hidden))
            stack.enter_context(hooks.block_outputs(self.model, on_output))
            for writer in (*self.mlps, *self.attentions):
                handle = writer.linear.register_forward_pre_hook(
                    lambda _m, args, writer=writer: take_inputs(writer, pick(args[0]))
                )
                stack.callback(handle.remove)
            hooks.forward(self.model, batch)
        return found[0]

    def units(self) -> list[RegisterNeuron]:
        """All hidden units that add to the outliers' deviation, the largest share first."""
        found = []
        for i, layer in enumerate(self.mlps):
            share = layer.share / self.outliers
            activation = layer.fired / layer.positive.clamp(min=1e-12)
            elsewhere = layer.elsewhere / self.ordinary
            for unit in (share > 0).nonzero().flatten().tolist():
                values = (float(v[unit]) for v in (activation, elsewhere, share))
                found.append(RegisterNeuron(i, unit, *values))
        return sorted(found, key=lambda n: -n.share)

    def heads(self) -> list[HeadShare]:
        """All attention heads, the largest share first."""
        found: list[HeadShare] = []
        for i, (block, writer) in enumerate(zip(self.model.blocks, self.attentions)):
            shares = (writer.share / self.outliers).view(block.attn.num_heads, -1).sum(1)
            found.extend(HeadShare(i, head, share) for head, share in enumerate(shares.tolist()))
        return sorted(found, key=lambda h: -h.share)


def layer_scale(block: ViT, index: int) -> torch.Tensor | None:
    """LayerScale ``(C,)`` of a block's attention (``index`` 1) or MLP (2), or None."""
    scale = getattr(getattr(block, f"ls{index}", None), "gamma", None)
    return getattr(block, f"gamma_{index}", None) if scale is None else scale
