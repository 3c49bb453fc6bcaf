"""The keys of the mesh."""

import dataclasses

from l1_jax.config.key import MAX_BATCH, key, when

# The order is the order of the devices: neighbours differ in `tensor`, whose messages are the most
# urgent.
MESH_AXES = ("pipeline", "data", "fsdp", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class ParallelismConfig:
    """Devices along each mesh axis, `MESH_AXES`; at most one may be -1, the rest of the devices."""

    data: int = key(
        -1, "copies of the model, each with its own part of the batch", resume="free", ge=-1
    )
    fsdp: int = key(
        1,
        "shards of parameters and optimizer state, each with its own part of the batch",
        resume="free",
        ge=-1,
    )
    tensor: int = key(1, "shards of heads, MLP hidden units and vocabulary", resume="free", ge=-1)
    context: int = key(1, "parts of the sequence", resume="free", ge=-1)
    pipeline: int = key(
        1, "stages of the layers, through which microbatches pass", resume="free", ge=-1
    )
    pipeline_microbatches: int | None = key(
        None,
        "microbatches in the pipeline; null is as many as divide batch_size, up to 4 a stage",
        resume="free",
        used_with=when("parallelism.pipeline", unlike=1),
        neutral=(1,),
        ge=1,
        le=MAX_BATCH,
    )
