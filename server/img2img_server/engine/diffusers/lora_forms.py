"""Computes the changes of weights in LoRA files: LoRA, LoCon, LoHa, LoKr and full differences, each
also with DoRA's magnitudes, changes of biases, and the forms of lora_products.py.

A file has groups of tensors (lora_file.py); the tensors of a group have the name of a layer and a
suffix. Each group becomes a `Change`, which computes the difference for one weight. lora_names.py
finds the layers of the model that belong to a name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from img2img_server.engine.diffusers.lora_options import LoraError, LoraOptions
from img2img_server.engine.diffusers.lora_products import (
    GLORA,
    IA3,
    OFT,
    fits,
    is_product,
    product_change,
    product_rank,
    product_sizes,
)


@dataclass(frozen=True, slots=True)
class Group:
    """The tensors of one layer, by their role."""

    name: str
    tensors: Mapping[str, Tensor]
    suffixes: Mapping[str, str]  # by role, as the file spells them

    @property
    def changes_weight(self) -> bool:
        """Whether the group changes the weight of the layer, not only its bias."""
        return not self.tensors.keys() <= _EXTRA_ROLES

    @property
    def shape(self) -> tuple[int, int]:
        """The numbers of outputs and inputs of the layer as the file has them; 0 if the form does
        not say one. The kernel of a convolution counts with the inputs only if the form does not
        separate them.
        """
        return self._sizes()

    def _sizes(self) -> tuple[int, int]:
        own = self.tensors
        if is_product(own):
            return product_sizes(own)
        if "up" in own:
            return own["up"].shape[0], own["down"].shape[1]
        if "diff" in own:
            outputs, *inputs = own["diff"].shape
            return outputs, inputs[0] if inputs else 1  # A norm has one value for each output.
        if "hada_w1_a" in own:
            if "hada_t1" in own:
                return own["hada_w1_a"].shape[1], own["hada_w1_b"].shape[1]
            return own["hada_w1_a"].shape[0], own["hada_w1_b"].shape[1]
        if not self.changes_weight:
            return own["bias_diff"].shape[0], 1
        first, second = _kronecker_factors(own)
        return first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]

    @property
    def kernel_size(self) -> tuple[int, ...] | None:
        """Returns the size of a convolution's kernel; () if the layer has none, None if unknown."""
        own = self.tensors
        for role in ("mid", "down", "diff", "hada_t1", "lokr_t2"):
            if role in own:
                return tuple(own[role].shape[2:])
        return tuple(own["lokr_w2"].shape[2:]) if "lokr_w2" in own else None

    def check(self) -> None:
        """Checks that the tensors form one change, fit each other, and are finite numbers.

        Raises:
            LoraError: They do not.
        """
        roles = set(self.tensors) - _EXTRA_ROLES
        if roles not in _COMPLETE and (roles or "bias_diff" not in self.tensors):
            have = ", ".join(sorted(roles)) or "nothing that changes a weight"
            lacking = sorted({"up", "down"} - roles)
            lacks = f"; {' and '.join(lacking)} is missing" if len(lacking) == 1 else ""
            raise LoraError(
                f"{self.name} has {have}, which is no complete LoRA, LoHa or LoKr{lacks}"
            )
        if is_product(self.tensors) and {"magnitude", "dora_scale"} & self.tensors.keys():
            raise LoraError(f"{self.name} has magnitudes of DoRA, which its form does not take")
        for role, tensor in self.tensors.items():
            suffix = self.suffixes[role]
            is_whole = role in ("alpha", "on_input") and not tensor.is_complex()
            is_number = tensor.is_floating_point() or is_whole
            if not is_number or not torch.isfinite(tensor.float()).all():
                raise LoraError(f"{self.name}{suffix} has values that are not finite numbers")
            if not tensor.numel():
                raise LoraError(f"{self.name}{suffix} has no values")
            if role in ("alpha", "on_input") and tensor.numel() != 1:
                raise LoraError(f"{self.name}{suffix} has {tensor.numel()} values instead of one")
        try:
            if self.changes_weight and not is_product(self.tensors):
                self.delta(torch.device("meta"))
            self._sizes()
        except (IndexError, RuntimeError, ValueError) as error:
            shapes = ", ".join(f"{it} {list(self.tensors[it].shape)}" for it in sorted(roles))
            raise LoraError(
                f"{self.name} has tensors that do not fit each other: {shapes}"
            ) from error

    def factor(self, options: LoraOptions, name: str) -> float:
        """Returns the factor of the change at scale 1: alpha / rank, or alpha / sqrt(rank)."""
        rank = self._rank
        if rank is None:
            return 1.0
        alpha = self.tensors.get("alpha")
        given = float(alpha) if alpha is not None else options.alpha(name)
        if given is None:
            return 1.0
        return given / (math.sqrt(rank) if options.is_rank_stabilised else rank)

    @property
    def _rank(self) -> int | None:
        """Returns the rank of the factors; None for a change that is stored whole."""
        own = self.tensors
        if is_product(own):
            return product_rank(own)
        for role in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
            if role in own:
                return own[role].shape[0]
        return None

    def bias(self, options: LoraOptions, name: str) -> tuple[Group, float] | None:
        """Returns the change of the layer's bias and its factor; None if there is none.

        Raises:
            LoraError: There are two, or one together with magnitudes, which peft does not have.
        """
        roles = {"bias", "bias_diff"} & self.tensors.keys()
        if not roles:
            return None
        if len(roles) > 1 or ("bias" in roles and "magnitude" in self.tensors):
            raise LoraError(f"{self.name} changes the bias in two forms, or with magnitudes")
        (role,) = roles
        suffix = {"diff": self.suffixes[role]}
        factor = self.factor(options, name) if role == "bias" else 1.0
        return Group(self.name, {"diff": self.tensors[role]}, suffix), factor

    def delta(self, device: torch.device | None = None) -> Tensor:
        """Returns the change of the weight without its factor, in float32.

        Args:
            device: None: that of the file's tensors.
        """
        own = {role: tensor.to(device, torch.float32) for role, tensor in self.tensors.items()}
        if "diff" in own:
            return own["diff"]
        if "up" in own:
            down = own["down"]
            if "mid" in own:
                down = torch.einsum("rskl,si->rikl", own["mid"], down.flatten(1))
            return (own["up"].flatten(1) @ down.flatten(1)).reshape(-1, *down.shape[1:])
        if "hada_t1" in own:
            first = _tucker(own["hada_t1"], own["hada_w1_a"], own["hada_w1_b"])
            return first * _tucker(own["hada_t2"], own["hada_w2_a"], own["hada_w2_b"])
        if "hada_w1_a" in own:
            first = own["hada_w1_a"] @ own["hada_w1_b"]
            return first * (own["hada_w2_a"] @ own["hada_w2_b"])
        first, second = _kronecker_factors(own)
        return torch.kron(first.reshape(*first.shape, *[1] * (second.ndim - 2)), second)


# The roles of tensors in addition to those that change the weight.
_EXTRA_ROLES = {"alpha", "magnitude", "dora_scale", "bias", "bias_diff"}
_HADA = {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}
_COMPLETE: tuple[set[str], ...] = (
    {"down", "up"},
    {"down", "up", "mid"},
    {"diff"},
    {*GLORA},
    {*OFT},
    {*OFT, "rescale"},
    {*IA3},
    _HADA,
    _HADA | {"hada_t1", "hada_t2"},
    *(
        first | second
        for first in ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
        for second in (
            {"lokr_w2"},
            {"lokr_w2_a", "lokr_w2_b"},
            {"lokr_w2_a", "lokr_w2_b", "lokr_t2"},
        )
    ),
)


def _tucker(core: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
    """Returns the kernel of a convolution that is stored in the form of Tucker."""
    return torch.einsum("ijkl,jr,ip->prkl", core, inputs, outputs)


def _kronecker_factors(own: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns the two factors of LoKr."""
    first = own["lokr_w1"] if "lokr_w1" in own else own["lokr_w1_a"] @ own["lokr_w1_b"]
    if "lokr_w2" in own:
        return first, own["lokr_w2"]
    if "lokr_t2" in own:
        return first, _tucker(own["lokr_t2"], own["lokr_w2_a"], own["lokr_w2_b"])
    return first, own["lokr_w2_a"] @ own["lokr_w2_b"]


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """The change that a group makes to one weight.

    Attributes:
        part, layer: The names of the part of the pipeline and of its layer.
        rows, columns: The outputs and the inputs of the group that belong to the weight; None: all.
    """

    part: str
    layer: str
    module: nn.Module
    weight: Tensor
    group: Group
    factor: float
    rows: Tensor | None = None
    columns: Tensor | None = None

    def check(self) -> None:
        """Checks the shapes, without computing the change.

        Raises:
            LoraError: They do not fit.
        """
        layer = self.layer
        is_vector = "diff" in self.group.tensors and self.group.tensors["diff"].ndim == 1
        if self.weight.ndim != 1 if is_vector else self.weight.ndim not in (2, 4):
            raise LoraError(f"{self.group.name} changes {layer}, which is no matrix or convolution")
        outputs, inputs = self.group.shape
        outputs = outputs if self.rows is None else len(self.rows)
        inputs = inputs if self.columns is None else len(self.columns)
        own_outputs, *rest = self.weight.shape
        own_inputs, flat = (rest or [1])[0], math.prod(rest)
        if is_product(self.group.tensors):
            is_cut = self.rows is not None and "oft_blocks" in self.group.tensors
            if is_cut or self.columns is not None or self.weight.ndim not in (2, 4):
                raise LoraError(
                    f"{self.group.name} changes several layers at once, among them {layer}, in a "
                    "form that cannot be split: merge it into the model, and serve the merged model"
                )
            outputs, inputs = outputs or own_outputs, inputs or own_inputs
        if outputs != own_outputs or inputs not in (own_inputs, flat):
            have, want = f"{outputs} x {inputs}", f"{own_outputs} x {own_inputs}"
            raise LoraError(
                f"{self.group.name} is for a layer of {have} values, but {layer} has {want}: the "
                "file belongs to another model"
            )
        if is_product(self.group.tensors) and not fits(self.group.tensors, self.weight):
            raise LoraError(f"{self.group.name} has another size than {layer}")
        kernel = self.group.kernel_size
        if kernel is not None and math.prod(kernel) * inputs != flat and inputs != flat:
            raise LoraError(f"{self.group.name} has another kernel than {layer}")
        if self._magnitude is not None:
            self._magnitude_axis()

    def delta(self, original: Tensor, scale: float) -> Tensor:
        """Returns the difference from the original weight, in float32."""
        own = self.group.tensors
        if is_product(own):
            own = {role: it.to(original.device, torch.float32) for role, it in own.items()}
            return product_change(own, original.float(), scale * self.factor, self.rows)
        change = self.group.delta()
        if self.rows is not None:
            change = change[self.rows]
        if self.columns is not None:
            change = change[:, self.columns]
        change = (change * self.factor).reshape(self.weight.shape).to(original.device)
        if self._magnitude is None:
            return change * scale
        original = original.float()
        # peft scales the change before the norm, other tools the result.
        inner, outer = (scale, 1.0) if "magnitude" in self.group.tensors else (1.0, scale)
        changed = original + inner * change
        magnitude, norms = self._norms(changed)
        return outer * (changed * (magnitude / norms) - original)

    @property
    def has_magnitude(self) -> bool:
        """Returns whether the change has magnitudes of DoRA."""
        return self._magnitude is not None

    @property
    def _magnitude(self) -> Tensor | None:
        own = self.group.tensors
        return own["magnitude"] if "magnitude" in own else own.get("dora_scale")

    def _magnitude_axis(self) -> int:
        """Returns the axis of the weight that has the magnitudes of DoRA.

        Raises:
            LoraError: Their number is another one.
        """
        magnitude = self._magnitude
        assert magnitude is not None
        outputs, inputs = self.group.shape
        is_by_input = (
            "dora_scale" in self.group.tensors
            and magnitude.ndim > 1
            and magnitude.shape[0] == 1
            and outputs > 1
        )
        axis = 1 if is_by_input else 0
        chosen, other = (self.columns, self.rows) if is_by_input else (self.rows, self.columns)
        whole = (outputs, inputs)[axis] if chosen is not None else self.weight.shape[axis]
        if magnitude.numel() != whole or other is not None:
            raise LoraError(f"{self.group.name} has magnitudes that do not fit its layer")
        return axis

    def _norms(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the magnitudes of DoRA and the norms of the weight, in shapes that broadcast."""
        magnitude, axis = self._magnitude, self._magnitude_axis()
        assert magnitude is not None
        chosen = self.columns if axis else self.rows
        magnitude = magnitude.flatten().float()
        if chosen is not None:
            magnitude = magnitude[chosen]
        magnitude = magnitude.to(weight.device)
        shape = [1] * weight.ndim
        shape[axis] = -1
        others = [dim for dim in range(weight.ndim) if dim != axis]
        return magnitude.reshape(shape), torch.linalg.vector_norm(weight, dim=others, keepdim=True)
