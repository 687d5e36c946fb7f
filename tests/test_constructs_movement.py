"""Networks that move values about: concatenation, slices, shuffles, padding, repetition, writes through views."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.cases import Case, Net, channelwise, check, conv, images, vectors

TWO = {"channels": (8, 8)}
NONE: dict[str, tuple[int, ...]] = {}


def other() -> dict[str, nn.Module]:
    return {"other": conv(3, 8)}


def second() -> dict[str, nn.Module]:
    return {"second": conv(8, 8)}


def narrow() -> dict[str, nn.Module]:
    return {"narrow": conv(8, 4)}


def written(change: Any) -> Any:
    """A body that changes a copy of its operand in place."""

    def body(m: Any, h: Tensor) -> Tensor:
        h = h.clone()
        change(m, h)
        return h

    return body


def add_to_slice(m: Any, h: Tensor) -> None:
    h[:, 4:8] = m.narrow(h.relu())


def scale_every_other(m: Any, h: Tensor) -> None:
    h[:, ::2].mul_(2)


def write_pieces(h: Tensor) -> Tensor:
    first, last = h.chunk(2, 1)
    first.add_(last)
    last.relu_()
    return h


def pieces_written() -> nn.Module:
    """Pieces of a split can be written only where no gradient flows."""
    network = Net(lambda m, x: m.tail(write_pieces(m.stem(x))).mean((2, 3)), stem=conv(3, 8), tail=conv(8, 4))
    network.stem.requires_grad_(False)
    return network


def write_rows(m: Any, h: Tensor) -> None:
    h[:, :, 0] = 1.0
    h[:, :, -1].mul_(3)


def write_through_permutation(m: Any, h: Tensor) -> None:
    h.permute(0, 2, 3, 1)[..., 2:5] *= 0.5


def write_through_view(m: Any, h: Tensor) -> None:
    h.view(h.shape[0], 2, 4, 6, 6)[:, 1].add_(1)


def write_by_index(m: Any, h: Tensor) -> None:
    h[:, torch.tensor([1, 3])] = 0.0


def shuffle(h: Tensor, groups: int) -> Tensor:
    batch, channels, height, width = h.shape
    return (
        h.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(batch, channels, height, width)
    )


def interleaved_pairs(m: Any, h: Tensor) -> Tensor:
    return torch.stack([h[:, 0::2], h[:, 1::2]], 2).flatten(1, 2)


INDEX = torch.tensor([7, 0, 3, 3, 5])

CASES = [
    # concatenation
    channelwise("cat", lambda m, h: torch.cat([h, m.second(h)], 1), 16, free=TWO, children=second),
    channelwise("cat_negative_dim", lambda m, h: torch.cat([h, m.second(h)], -3), 16, free=TWO, children=second),
    channelwise("cat_self", lambda m, h: torch.cat([h, h], 1), 16),
    channelwise("cat_self_thrice", lambda m, h: torch.cat([h, h.relu(), h.flip(1)], 1), 24),
    channelwise(
        "cat_nested",
        lambda m, h: torch.cat([torch.cat([h, m.second(h)], 1), torch.cat([m.second(h).tanh(), h], 1)], 1),
        32,
        free=TWO,
        children=second,
    ),
    channelwise(
        "cat_constant", lambda m, h: torch.cat([h, torch.ones_like(h[:, :2])], 1), 10, free={"channels": (2, 6)}
    ),
    channelwise(
        "cat_zeros",
        lambda m, h: torch.cat([h, h.new_zeros(h.shape[0], 2, 6, 6)], 1),
        10,
        free={"channels": (8,), "other": (2,)},
    ),
    channelwise("cat_along_space", lambda m, h: torch.cat([h, m.second(h)], 2), 8, children=second),
    Case(
        "cat_raw_input",
        lambda: Net(
            lambda m, x: m.tail(torch.cat([x, m.stem(x), x], 1)).mean((2, 3)), stem=conv(3, 8), tail=conv(14, 4)
        ),
        images(),
        {"channels": (8,)},
        ("network's input",),
    ),
    Case(
        "dense_block",
        lambda: Net(
            lambda m, x: m.c3(torch.cat([x, a := m.c1(x), b := m.c2(torch.cat([x, a], 1)), a * b], 1)).mean((2, 3)),
            c1=conv(3, 8),
            c2=conv(11, 8),
            c3=conv(27, 4),
        ),
        images(),
        {"channels": (8,)},
    ),
    channelwise("stack", lambda m, h: torch.stack([h, m.second(h)], 1).flatten(1, 2), 16, children=second),
    channelwise("stack_last", lambda m, h: torch.stack([h, m.second(h)], -1).sum(-1), 8, children=second),
    # slices and splits
    channelwise(
        "chunk",
        lambda m, h: torch.cat([p.relu() if i else p for i, p in enumerate(h.chunk(2, 1))], 1),
        8,
        free={"channels": (4, 4)},
    ),
    channelwise(
        "chunk_product", lambda m, h: (lambda a, b: a * b.sigmoid())(*h.chunk(2, 1)), 4, free={"channels": (4,)}
    ),
    channelwise("chunk_uneven", lambda m, h: torch.cat(h.chunk(3, dim=1)[::-1], 1), 8, free={"channels": (2, 3, 3)}),
    channelwise("chunk_negative_dim", lambda m, h: torch.cat(h.chunk(2, -3)[::-1], -3), 8, free={"channels": (4, 4)}),
    channelwise(
        "split_uneven",
        lambda m, h: torch.cat([(p := h.split([1, 5, 2], 1))[1], p[0], p[2].abs()], 1),
        8,
        free={"channels": (2, 5)},
    ),
    channelwise(
        "split_size",
        lambda m, h: torch.cat([p * (i + 1) for i, p in enumerate(h.split(3, 1))], 1),
        8,
        free={"channels": (2, 3, 3)},
    ),
    channelwise("split_dropped_piece", lambda m, h: h.split([3, 5], 1)[1], 5, free={"channels": (3, 5)}),
    channelwise(
        "tensor_split", lambda m, h: torch.cat(h.tensor_split((2, 3), dim=1)[::-1], 1), 8, free={"channels": (2, 5)}
    ),
    channelwise(
        "slice_strided", lambda m, h: torch.cat([h[:, 1::2], h[:, ::2].relu()], 1), 8, free={"channels": (4, 4)}
    ),
    channelwise("slice_step_three", lambda m, h: torch.cat([h[:, 1:7:3], h], 1), 10, free={"channels": (2, 6)}),
    channelwise("slice_negative", lambda m, h: torch.cat([h[:, -3:], h[:, :-3]], 1), 8, free={"channels": (3, 5)}),
    channelwise("slice_beyond", lambda m, h: h[:, 2:100], 6, free={"channels": (2, 6)}),
    channelwise("slice_space", lambda m, h: h[:, :, 1:-1, ::2], 8),
    channelwise(
        "narrow", lambda m, h: torch.cat([h.narrow(1, 2, 6), h.narrow(-3, -8, 2)], 1), 8, free={"channels": (2, 6)}
    ),
    channelwise("select_one", lambda m, h: h * h[:, 2:3], 8, free={"channels": (7,)}, pins=("",)),
    channelwise(
        "select_int",
        lambda m, h: h * h.select(1, -1).unsqueeze(1),
        8,
        free={"channels": (7,)},
        pins=("addressed by its number",),
    ),
    channelwise("select_row", lambda m, h: h[:, :, 3:4] + h.select(2, 0).unsqueeze(2), 8, free={"residual": (8,)}),
    channelwise("unbind_space", lambda m, h: sum(h.unbind(2)).unsqueeze(2), 8, free={"residual": (8,)}),
    channelwise("unbind_channels", lambda m, h: torch.stack(h.unbind(1)[::-1], 1), 8, free=NONE, pins=("taken apart",)),
    # order
    channelwise("channel_shuffle_view", lambda m, h: shuffle(h, 2), 8),
    channelwise("channel_shuffle", lambda m, h: F.channel_shuffle(h, 4), 8, free={"channels": (4,)}),
    channelwise("interleave_pairs", interleaved_pairs, 8, free={"channels": (4,)}),
    channelwise("flip", lambda m, h: h.flip(1), 8),
    channelwise("flip_all_negative", lambda m, h: h.flip((-1, -3)), 8),
    channelwise("roll", lambda m, h: h.roll(3, 1), 8),
    channelwise("roll_many", lambda m, h: torch.roll(h, (-2, 1, 9), (1, 2, -3)), 8),
    channelwise("gather_constant", lambda m, h: h[:, INDEX], 5, free={"channels": (3, 4)}),
    channelwise(
        "index_select", lambda m, h: torch.cat([h.index_select(1, INDEX), h], 1), 13, free={"channels": (3, 4)}
    ),
    channelwise(
        "index_buffer",
        lambda m, h: h[:, m.order],
        8,
        children=lambda: {"order": nn.Buffer(torch.tensor([3, 1, 0, 2, 7, 6, 4, 5]))},
    ),
    channelwise("take_along_dim", lambda m, h: h.gather(1, h.argsort(1)), 8, free=NONE, pins=("run time",)),
    channelwise("permute", lambda m, h: h.permute(0, 2, 3, 1).relu().permute(0, -1, 1, 2), 8),
    channelwise("movedim", lambda m, h: h.movedim(1, -1).tanh().movedim(-1, 1), 8),
    channelwise("swapaxes", lambda m, h: h.swapaxes(1, -1).tanh().transpose(-1, 1), 8),
    channelwise("unflatten", lambda m, h: h.unflatten(1, (2, 4)).flip(2).flatten(1, 2), 8, free={"channels": (4,)}),
    channelwise("view_groups_max", lambda m, h: h.view(-1, 4, 2, 6, 6).amax(2), 4, free={"channels": (2, 4)}),
    channelwise("squeeze", lambda m, h: h.mean(2, keepdim=True).squeeze(2).unsqueeze(-1), 8),
    # padding
    channelwise("pad_channels", lambda m, h: F.pad(h, (0, 0, 0, 0, 2, 3)), 13, free={"channels": (8,), "other": (5,)}),
    channelwise("pad_channels_value", lambda m, h: F.pad(h, (0, 0, 0, 0, 1, 0), value=2.0), 9),
    channelwise("pad_crop", lambda m, h: F.pad(h, (0, 0, 0, 0, -1, -2)), 5, free={"channels": (3, 5)}),
    channelwise("pad_space", lambda m, h: F.pad(h, (1, 2, -1, 1), value=0.5), 8),
    *(
        channelwise(f"pad_{mode}", lambda m, h, mode=mode: F.pad(h, (1, 2, 2, 1), mode=mode), 8)
        for mode in ("reflect", "replicate", "circular")
    ),
    # space and channels
    channelwise("pixel_shuffle", lambda m, h: F.pixel_shuffle(h, 2), 2, free={"channels": (2,)}),
    channelwise("pixel_unshuffle", lambda m, h: F.pixel_unshuffle(h, 2), 32),
    channelwise("pixel_both", lambda m, h: F.pixel_shuffle(F.pixel_unshuffle(h, 2).relu(), 2), 8),
    channelwise(
        "space_to_depth_view",
        lambda m, h: h.unflatten(2, (3, 2)).unflatten(4, (3, 2)).permute(0, 1, 3, 5, 2, 4).flatten(1, 3),
        32,
    ),
    channelwise("unfold", lambda m, h: F.unfold(h, 3, padding=1).unflatten(2, (6, 6)), 72),
    channelwise("unfold_fold", lambda m, h: F.fold(F.unfold(h, 2, stride=2), (6, 6), 2, stride=2), 8),
    channelwise("unfold_windows", lambda m, h: h.unfold(2, 2, 2).unfold(3, 2, 2).mean((-1, -2)), 8),
    channelwise(
        "unfold_channels", lambda m, h: h.unfold(1, 2, 2).sum(-1), 4, free=NONE, pins=("a window slides over it",)
    ),
    # repetition
    channelwise("repeat", lambda m, h: h.repeat(1, 3, 1, 1), 24),
    channelwise("tile", lambda m, h: torch.tile(h, (2, 1, 1)), 16),
    channelwise("repeat_interleave", lambda m, h: h.repeat_interleave(2, 1), 16),
    channelwise("expand", lambda m, h: h.unsqueeze(2).expand(-1, -1, 3, -1, -1).flatten(1, 2), 24),
    channelwise("expand_one_channel", lambda m, h: h * h.mean(1, keepdim=True).expand(-1, 8, -1, -1), 8),
    channelwise("broadcast_as", lambda m, h: h * h.mean((2, 3), keepdim=True).expand_as(h), 8),
    # writes through views
    channelwise("write_slice", written(add_to_slice), 8, free={"channels": (4, 4)}, children=narrow),
    channelwise("write_strided", written(scale_every_other), 8, free={"channels": (4, 4)}),
    Case("write_pieces", pieces_written, images(), {"residual": (4,)}),
    channelwise("write_rows", written(write_rows), 8),
    channelwise("write_permuted", written(write_through_permutation), 8, free={"channels": (3, 5)}),
    channelwise("write_view", written(write_through_view), 8, free={"channels": (4,)}),
    channelwise("write_index", written(write_by_index), 8, free=NONE, pins=("index_put",)),
    # flattening
    *(
        Case(
            f"flatten_{name}",
            lambda order=order: Net(
                lambda m, x: m.head(m.stem(x).permute(order).flatten(1)), stem=conv(3, 8), head=nn.Linear(8 * 16, 5)
            ),
            images(4),
            {"channels": (8,)},
        )
        for name, order in {
            "plain": (0, 1, 2, 3),
            "permuted": (0, 2, 3, 1),
            "between": (0, 2, 1, 3),
            "negative": (0, -1, 1, 2),
        }.items()
    ),
    Case(
        "flatten_batch_norm",
        lambda: nn.Sequential(
            conv(3, 8),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(128, 6),
            nn.BatchNorm1d(6),
            nn.Linear(6, 3),
        ),
        images(4),
        {"channels": (8,), "ffn": (6,)},
        kind="native",
    ),
    Case(
        "flatten_two_paths",
        lambda: Net(
            lambda m, x: m.head((h := m.stem(x)).flatten(1) + m.twin(h).flatten(1)),
            stem=conv(3, 8),
            twin=conv(8, 8),
            head=nn.Linear(128, 5),
        ),
        images(4),
        {"residual": (8,)},
    ),
    Case(
        "view_with_batch",
        lambda: Net(
            lambda m, x: m.b(m.a(x.reshape(-1, 6)).view(x.shape[0], 4, -1)), a=nn.Linear(6, 8), b=nn.Linear(8, 3)
        ),
        vectors(4, 6),
        {"ffn": (8,)},
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_movement(case: Case) -> None:
    check(case)
