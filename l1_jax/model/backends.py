"""Which way of attention a run takes, and the devices' own kernels for it.

Legend: B batch, T length, N heads, K key/value heads, H head size.
"""

import math
from typing import NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh

from l1_jax.config.schema import Config
from l1_jax.errors import UserError
from l1_jax.model.attend import ATTENTION
from l1_jax.parallel.layout import Layout
from l1_jax.parallel.sharding import is_divided, spec

FASTEST = {"gpu": "cudnn", "tpu": "splash", "cpu": "blocked"}


class Backend(NamedTuple):
    """A way of attention, and why it is not the fastest of the platform."""

    name: str  # plain, blocked, cudnn or splash
    why: str | None


def choose_attention(config: Config, mesh: Mesh | AbstractMesh, dropout: float, platform: str | None = None) -> Backend:
    """The backend that `training.attention` means; for auto the platform's fastest, else `plain`. `dropout` is that of
    the computation, `platform` one for whose devices a plan is made. UserError where what is asked for cannot run."""
    if platform is None and isinstance(mesh, Mesh):
        platform = {"cuda": "gpu"}.get(mesh.devices.flat[0].platform, mesh.devices.flat[0].platform)
    asked = config.training.attention
    wanted = FASTEST.get(platform or "", "plain") if asked == "auto" else asked
    why = obstacle(wanted, config, mesh, dropout, platform)
    if why is None:
        return Backend(wanted, None)
    if asked != "auto":
        raise UserError(f"training.attention {asked} cannot run: {why}", "Change that, or set training.attention: auto")
    return Backend("plain", f"not {wanted}: {why}")


def obstacle(
    name: str, config: Config, mesh: Mesh | AbstractMesh, dropout: float, platform: str | None = None
) -> str | None:
    """Why a backend cannot run there; None where it can. Without a platform any will do."""
    model, layout = config.model, Layout.of(mesh)
    size, precision = model.n_embd // model.n_heads, config.training.precision
    divided = (layout.context > 1, "parallelism.context divides the sequence")
    stages = (layout.stages > 1, "it does not run in a pipeline")
    draws = (dropout > 0, "it draws no dropout, and model.dropout is not 0")
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else None
    capability = str(getattr(device, "compute_capability", "8.0"))  # of AMD's GPUs a name, as gfx942
    obstacles = {
        "plain": [],
        "blocked": [divided],
        "cudnn": [
            (platform not in ("gpu", None) or not capability[0].isdigit(), "it is for NVIDIA GPUs"),
            (capability[:2] in ("5.", "6.", "7."), "it needs compute capability 8.0"),
            (precision == "float32", "it computes in bfloat16 or float16"),
            (size % 8 > 0 or size > 128, f"it takes heads of 8, 16, ... 128 dimensions, not {size}"),
            (config.data.document_mask, "it has no document mask"),
            *(draws, divided, stages),
        ],
        "splash": [
            (platform not in ("tpu", None), "it is for TPUs"),
            (model.max_seq_length % 128 > 0, "it takes sequences of 128, 256, ... tokens"),
            *(draws, divided, stages),
        ],
    }
    why = next((reason for applies, reason in obstacles[name] if applies), None)
    return cudnn_refuses(size, precision) if name == "cudnn" and why is None and device else why


def cudnn_refuses(size: int, precision: str) -> str | None:
    """What jax says against heads of `size` by the cuDNN that is installed; None where nothing."""
    x_BTNH = jax.ShapeDtypeStruct((1, 128, 1, size), precision)
    try:
        jax.eval_shape(attend_cudnn, x_BTNH, x_BTNH, x_BTNH)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return str(error).partition("\n")[0]
    return None


def attend_cudnn(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
    """Causal attention by cuDNN's flash kernel."""
    y_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation="cudnn")
    return checkpoint_name(y_BTNH, ATTENTION)


def attend_splash(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None, interpret: bool = False
) -> jax.Array:
    """Causal attention by JAX's Pallas kernel for TPUs, each device for its rows and heads. `interpret` runs it
    anywhere, slowly."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a while

    length, size = q_BTNH.shape[1], q_BTNH.shape[3]
    block = next(block for block in (512, 384, 256, 128) if length % block == 0)
    one = {"block_q": block, "block_kv": block, "block_q_dkv": block, "block_kv_dkv": block}
    blocks = splash.BlockSizes(**one, block_q_dq=block, block_kv_dq=block)  # type: ignore[arg-type]

    def local(q, k, v, segment_ids):
        mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * q.shape[2])
        options = {"head_shards": 1, "q_seq_shards": 1, "residual_checkpoint_name": ATTENTION, "interpret": interpret}
        kernel = splash.make_splash_mha(mask, block_sizes=blocks, **options)  # type: ignore[arg-type]
        q, k, v = (x.swapaxes(1, 2) for x in (q / math.sqrt(size), k, v))
        segments = None if segment_ids is None else splash.SegmentIds(segment_ids, segment_ids)
        return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)

    if not is_divided():
        return local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
    heads, rows = spec(("batch", None, "heads", None)), spec(("batch", None))
    places = (heads, heads, heads, None if segment_ids_BT is None else rows)
    mapped = jax.shard_map(local, in_specs=places, out_specs=heads, check_vma=False)
    return mapped(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
