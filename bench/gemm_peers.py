"""The same product by others: torch in bfloat16, its INT4 and dynamic INT8, and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from tersor.qweight import QWeight

Copies = Callable[[int], int]  # bytes of a weight -> how many copies to rotate over
Result = Callable[[], Tensor]


class Bound(NamedTuple):
    calls: list[Callable[[], object]]
    result: Result  # of the first product, after a call


class Peer(Protocol):
    products: int  # matrix products in a call

    def bind(self, x: Tensor) -> Bound: ...


class TorchPeer:
    """product(x, weight) for each of some equal weights, x in the dtype that it works in."""

    products = 1

    def __init__(
        self,
        weights: list[object],
        product: Callable[[Tensor, object], Tensor],
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        self.weights, self.product, self.dtype = weights, product, dtype

    def bind(self, x: Tensor) -> Bound:
        x = x.to(self.dtype)
        calls = [lambda w=w: self.product(x, w) for w in self.weights]
        return Bound(calls, calls[0])


def torch_bf16(q: QWeight, w: Tensor, copies: Copies) -> Peer:
    weights = [w.clone() for _ in range(copies(w.nbytes))]
    return TorchPeer(weights, torch.nn.functional.linear)


def torch_int4(q: QWeight, w: Tensor, copies: Copies) -> Peer:
    """aten::_weight_int4pack_mm_for_cpu, group-wise, bfloat16 activations."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.codes.int(), 1)
    scales = q.scales.T.bfloat16()
    grid = torch.stack([scales, torch.zeros_like(scales)], dim=-1).contiguous()  # scale, zero
    group = q.k // q.scales.shape[1]
    weights = [packed.clone() for _ in range(copies(packed.nbytes))]
    return TorchPeer(
        weights,
        lambda x, p: torch.ops.aten._weight_int4pack_mm_for_cpu(x, p, group, grid),
    )


def torch_int8(q: QWeight, w: Tensor, copies: Copies) -> Peer:
    """Dynamic quantization: INT8 weights per row, activations quantized in the call, float32."""
    scale = w.float().abs().amax(1) / 127
    quantized = torch.quantize_per_channel(
        w.float(), scale, torch.zeros_like(scale, dtype=torch.int64), 0, torch.qint8
    )
    prepack = torch.ops.quantized.linear_prepack
    weights = [prepack(quantized, None) for _ in range(copies(w.numel()))]
    return TorchPeer(weights, lambda x, p: torch.ops.quantized.linear_dynamic(x, p), torch.float32)


class OnnxRuntime:
    """MatMulNBits, 4 bits, accuracy_level 4 (int8 activations), float32 in and out.

    One graph with a node for each copy of the weight, so that a call is one session run: the
    runtime's cost per run is divided by the number of copies, in its favour.
    """

    def __init__(self, q: QWeight, w: Tensor, copies: Copies) -> None:
        import onnxruntime as ort
        from onnx import TensorProto, helper, numpy_helper

        group = q.k // q.scales.shape[1]
        blocks = q.codes.view(q.n, -1, group)
        packed = (blocks[..., ::2] | (blocks[..., 1::2] << 4)).contiguous().numpy()
        scales = q.scales.float().numpy()
        self.n, self.products = q.n, copies(packed.nbytes)
        nodes, stored, outputs = [], [], []
        for i in range(self.products):
            # Rows in another order each time: the runtime merges nodes that compute the same.
            stored += [
                numpy_helper.from_array(np.roll(packed, i, axis=0), f"w{i}"),
                numpy_helper.from_array(np.roll(scales, i, axis=0), f"s{i}"),
            ]
            nodes.append(
                helper.make_node(
                    "MatMulNBits", ["x", f"w{i}", f"s{i}"], [f"y{i}"], domain="com.microsoft",
                    K=q.k, N=q.n, bits=4, block_size=group, accuracy_level=4,
                )
            )  # fmt: skip
            outputs.append(helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["m", q.n]))
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", q.k])
        model = helper.make_model(
            helper.make_graph(nodes, "products", [x], outputs, stored),
            opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)],
            ir_version=9,
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )

    def bind(self, x: Tensor) -> Bound:
        import onnxruntime as ort

        binding = self.session.io_binding()
        value = ort.OrtValue.ortvalue_from_numpy(x.float().numpy())
        binding.bind_ortvalue_input("x", value)
        made = []
        for i in range(self.products):
            made.append(ort.OrtValue.ortvalue_from_shape_and_type([len(x), self.n], np.float32))
            binding.bind_ortvalue_output(f"y{i}", made[-1])
        return Bound(
            [lambda: self.session.run_with_iobinding(binding)],
            lambda: torch.from_numpy(made[0].numpy()),
        )


PEERS: dict[str, Callable[[QWeight, Tensor, Copies], Peer]] = {
    "torch bf16": torch_bf16,
    "torch int4": torch_int4,
    "torch int8": torch_int8,
    "onnxruntime": OnnxRuntime,
}
