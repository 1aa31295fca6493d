"""A CLIP text encoder, a few positions at a time: as many as it takes to see that a prompt is out of the running.

The encoder is causal: what it puts out at a position depends on that position and those before it alone. So the squared
distance of a prompt's embedding to a target is a sum that only grows from position to position, and

- prompts that begin alike are computed once, as far as they are alike;
- a prompt whose sum has passed a bound is given up there, and it is certain that its distance is above the bound.

Both leave every distance that isn't above the bound what the whole encoder gives for it, up to rounding.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from excise.eval.prompt_tokens import Ids

#: For each layer the keys and values of the positions so far, with shape (n, heads, positions, d / heads).
Past: TypeAlias = list[tuple[Tensor, Tensor]]


class CausalText:
    """transformers' CLIP text encoder, with the same modules: only its attention is called otherwise.

    Args:
        text_model: the ``text_model`` of a ``CLIPTextModel``, in evaluation mode.
    """

    def __init__(self, text_model: Any) -> None:
        self._model = text_model
        self._heads = int(text_model.config.num_attention_heads)

    @property
    def device(self) -> torch.device:
        """Where it is."""
        device: torch.device = self._model.embeddings.token_embedding.weight.device
        return device

    def __call__(self, ids: Tensor, start: int, past: Past) -> tuple[Tensor, Past]:
        """The last hidden states of the next positions.

        Args:
            ids: with shape (n, s).
            start: how many positions came before.
            past: of those, empty at the start.

        Returns:
            Hidden states with shape (n, s, d), and the past with these positions.
        """
        model, end = self._model, start + ids.shape[1]
        positions = torch.arange(start, end, device=ids.device)
        hidden = model.embeddings(input_ids=ids, position_ids=positions[None])
        seen = torch.arange(end, device=ids.device)[None] <= positions[:, None]
        longer: Past = []
        for number, layer in enumerate(model.encoder.layers):
            normed, attention = layer.layer_norm1(hidden), layer.self_attn
            query, key, value = (self._split(one(normed)) for one in _projections(attention))
            if past:
                key, value = (torch.cat(pair, dim=2) for pair in zip(past[number], (key, value), strict=True))
            longer.append((key, value))
            mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen)
            hidden = hidden + attention.out_proj(mixed.transpose(1, 2).flatten(2))
            hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        last: Tensor = model.final_layer_norm(hidden)
        return last, longer

    def _split(self, states: Tensor) -> Tensor:
        """(n, s, d) → (n, heads, s, d / heads)."""
        count, positions, _ = states.shape
        return states.view(count, positions, self._heads, -1).transpose(1, 2)


@torch.inference_mode()
def bounded_distances(
    model: CausalText, ids: Ids, target: Tensor, *, bound: float = math.inf, stride: int = 8
) -> npt.NDArray[np.float64]:
    """``‖emb(ids) − target‖²`` of each row, with shape (n,); above ``bound``, any value that is above it too.

    Args:
        ids: with shape (n, t).
        target: float32 with shape (t, d), on the model's device.
        bound: what is above it needn't be known exactly.
        stride: positions at a time.
    """
    found = np.zeros(len(ids))
    running, prefix = np.arange(len(ids)), np.zeros(len(ids), np.intp)  # rows, and which of the prefixes each has
    sums, past = np.zeros(1), Past()
    for start in range(0, ids.shape[1], stride):
        chunk = ids[running, start : start + stride]
        if not len(chunk):
            break
        _, first, prefix_of = np.unique(
            np.column_stack([prefix, chunk]), axis=0, return_index=True, return_inverse=True
        )
        parents = prefix[first]
        states, past = model(torch.from_numpy(chunk[first]).to(target.device), start, _chosen(past, parents, len(sums)))
        difference = states.float() - target[start : start + stride]
        sums = sums[parents] + difference.square().sum((1, 2), dtype=torch.float64).cpu().numpy()
        prefix = prefix_of.reshape(-1)
        found[running] = sums[prefix]
        # A sum that isn't a number goes on to the end, where it is seen.
        inside = ~(sums[prefix] > bound)
        running, prefix = running[inside], prefix[inside]
    return found


def _projections(attention: Any) -> tuple[Any, Any, Any]:
    return attention.q_proj, attention.k_proj, attention.v_proj


def _chosen(past: Past, rows: npt.NDArray[np.intp], count: int) -> Past:
    """The past of some of ``count`` prefixes; copied only where they aren't all of them."""
    if not past or np.array_equal(rows, np.arange(count)):
        return past
    places = torch.from_numpy(rows).to(past[0][0].device)
    return [(key[places], value[places]) for key, value in past]
