"""A whole layer of the 7B, compiled for an H100 that is not here. `python scan_triton.py` prints it.

Between the matrix products and the scan, torch.compile fuses everything into a few kernels. Its compiler,
inductor, decides which from shapes alone, and knows the bytes that each one reads and writes. So a block of
mamba.py is traced with tensors whose memory is never touched. Then inductor is told that they lie on an H100,
and is stopped before it writes code. It uses inductor's inner parts, as they are in torch 2.13.
"""
from functools import partial
from unittest import mock

import torch
from torch._inductor import compile_fx, scheduler
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_map

import mamba
import scan
import scan_triton

H100 = DeviceProperties(type="cuda", index=0, cc=90, major=9, multi_processor_count=132, warp_size=32,
                        regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048,
                        max_threads_per_block=1024)

class Enough(Exception):
    """Raised to stop torch.compile."""

def layer_kernels(b: int, l: int, training: bool, resets: bool = False) -> dict[str, list[int]]:
    """The bytes of each kernel of a layer's "forward" and, if training, of its "backward".

    Matrix products and the scan are not among them. It is an error if the graph breaks anywhere.
    """
    block, stream, past, h = inputs(b, l)
    reset = torch.empty(b, l, dtype=torch.bool) if resets else None
    return fused(block.forward, stream.requires_grad_(training), past, h, reset)

def token_kernels() -> list[int]:
    """The same of the step that writes one token."""
    block, stream, past, h = inputs(1, 1)
    out = torch.empty(1, 1, len(block.norm.weight), dtype=torch.bfloat16)
    return fused(block.step, stream, out, past, h, block.mixer.constants())["forward"]

def inputs(b: int, l: int):
    """A block with the dtypes of a GPU, and what it reads, in memory that nobody touches."""
    config = mamba.MambaConfig()
    with torch.device("meta"):
        block = mamba.Block(config)
    for name, p in block.named_parameters():
        if not name.endswith(mamba.KEEP_FP32):
            p.data = p.data.bfloat16()
    block.to_empty(device="cpu")
    past = torch.empty(b, config.d_conv - 1, config.d_inner, dtype=torch.bfloat16)
    h = torch.empty(b, config.d_inner, config.d_state)
    return block, torch.empty(b, l, config.d_model), past, h

def fused(call, stream, *more) -> dict[str, list[int]]:
    """The kernels that inductor makes of call(stream, *more), with a backward if the stream has a gradient."""
    found = {}
    inductor = partial(compile_fx.compile_fx, inner_compile=partial(group, found))
    compiled = torch.compile(call, fullgraph=True, backend=inductor)
    with (mock.patch.object(scan, "default_backend", lambda device, l: "triton"),
          mock.patch.object(scan_triton.triton, "JITFunction", type(None)),     # else a CPU's x is refused
          mock.patch.object(mamba, "NO_UNITS", []),             # as a GPU multiplies
          torch._functorch.config.patch(force_non_lazy_backward_lowering=True),
          torch.set_grad_enabled(stream.requires_grad)):
        try:
            compiled(stream, *more)
        except torch._dynamo.exc.BackendCompilerFailed as e:
            if not isinstance(e.inner_exception, Enough):
                raise
    return found

def group(found: dict, graph, inputs, is_backward=False, is_inference=False, **_):
    """Take inductor's steps up to the groups of operations that become a kernel each. Note their bytes."""
    compile_fx.view_to_reshape(graph)
    fake = compile_fx.fake_tensor_prop(graph, inputs)
    compile_fx._recursive_record_original_output_strides(graph)
    with V.set_fake_mode(fake), V.set_debug_handler(DebugContext()):
        compile_fx._recursive_post_grad_passes(graph, is_inference=is_inference)
        with fake:
            inputs = [to_gpu(v) for v in inputs]
            for node in graph.graph.nodes:
                node.meta["val"] = tree_map(to_gpu, node.meta.get("val"))
                if "device" in node.kwargs:
                    node.kwargs = node.kwargs | {"device": torch.device("cuda:0")}
        lowering = GraphLowering(graph, inputs, is_inference=is_inference, is_backward=is_backward)
        with (V.set_graph_handler(lowering), V.set_extern_kernel_nodes([]),
              mock.patch.object(scheduler, "has_triton", lambda: True),
              mock.patch.object(DeviceProperties, "create", lambda device: H100)):
            lowering.run(*inputs)
            lowering._update_scheduler()
            nodes = lowering.scheduler.nodes
            others = scheduler.ExternKernelSchedulerNode, scheduler.NopKernelSchedulerNode
            fused = [node for node in nodes if not isinstance(node, others)]
            sizes = [node.get_read_write_buffers_sizes() for node in fused]
    found["backward" if is_backward else "forward"] = sizes
    if is_backward or is_inference:
        raise Enough
    return lambda *args: None

def to_gpu(v):
    """A tensor without data, of a GPU, in place of one of the CPU."""
    if not isinstance(v, torch.Tensor):
        return v
    return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="cuda:0")
