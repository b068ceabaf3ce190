"""Plant register neurons: hidden units that fire on chosen patches and write a long vector there."""

import torch

from phreg_deploy.distill.neurons.contributions import layer_scale
from phreg_deploy.distill.neurons.transplant import _rows
from phreg_deploy.models import hooks


class Markers:
    """Images of noise in which some patches show a marker, at places that depend on the image.

    ``batches``: images ``(8, 3, H, W)``. ``shows``: marker of each patch, ``(B, N)``, -1 for none.
    """

    def __init__(self, model, kinds, images=64, shown=3, seed=0, contrast=1.0):
        generator = torch.Generator().manual_seed(seed)
        height, width = model.patch_embed.patch_size
        rows, columns = model.patch_embed.grid_size
        patterns = contrast * torch.randn(kinds, 3, height, width, generator=generator)
        pixels = torch.randn(images, 3, *model.patch_embed.img_size, generator=generator)
        self.shows = torch.full((images, rows * columns), -1)
        for i in range(images):
            for place in torch.randperm(rows * columns, generator=generator)[:shown].tolist():
                kind = int(torch.randint(kinds, (), generator=generator))
                y, x = place // columns * height, place % columns * width
                pixels[i, :, y : y + height, x : x + width] = patterns[kind]
                self.shows[i, place] = kind
        self.batches = list(pixels.split(8))


@torch.no_grad()
def read_block(model, batches, block):
    """Inputs of a block's MLP and outputs of the block at patch tokens, ``(B, N, C)``."""
    inputs, outputs, prefix = [], [], model.num_prefix_tokens
    handle = model.blocks[block].mlp.register_forward_pre_hook(lambda _m, args: inputs.append(args[0][:, prefix:]))
    with hooks.block_outputs(model, lambda i, out: outputs.append(out[:, prefix:]) if i == block else None):
        for batch in batches:
            hooks.forward(model, batch)
    handle.remove()
    return torch.cat(inputs), torch.cat(outputs)


@torch.no_grad()
def plant_unit(model, batches, fires, block, unit, factor, level=8.0, shortens=False):
    """Make one hidden unit fire at ``level`` where ``fires`` ``(B, N)`` is true.

    It writes a random vector of ``factor`` times the block's median norm; with ``shortens``, ``factor`` times the mean
    of the other tokens, with the opposite sign.
    """
    generator = torch.Generator().manual_seed(1000 * block + unit)
    inputs, outputs = (x.double() for x in read_block(model, batches, block))
    here, others = inputs[fires], inputs[~fires]
    spread = torch.cov(others.T) + 0.02 * torch.eye(inputs.shape[-1], dtype=torch.float64)
    direction = torch.linalg.solve(spread, here.mean(0) - others.mean(0))
    high, low = float((here @ direction).mean()), float((others @ direction).max())
    gain = (level + 12) / (high - low)
    mlp = model.blocks[block].mlp
    (weight, bias), value = _rows(mlp, unit)
    weight.copy_((gain * direction).to(weight))
    bias.fill_(level - gain * high)
    if value is not None:
        value[0].zero_()
        value[1].fill_(1.0)
    if shortens:
        vector = -factor / level * outputs[~fires].mean(0).float()
    else:
        vector = torch.randn(inputs.shape[-1], generator=generator)
        vector *= factor * float(outputs.norm(dim=-1).median()) / level / vector.norm()
    scale = layer_scale(model.blocks[block], 2)
    mlp.fc2.weight[:, unit] = vector if scale is None else vector / scale
