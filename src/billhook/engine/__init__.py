"""Block stores, and runs through the blocks of a model."""

from billhook.engine.batches import (
    Batch,
    Loss,
    Outputs,
    Run,
    check_batches,
    check_one_device,
    examples_of,
    inputs_of,
    model_loss,
    run_with_loss,
    runs_fingerprint,
    runs_of,
    source_of,
    token_outputs,
    with_progress,
)
from billhook.engine.comm import SINGLE_PROCESS, Comm, Reduce
from billhook.engine.device import check_device
from billhook.engine.fsdp import WRAPPED, class_of
from billhook.engine.lazy import LazyTensors, Read, by_parameter
from billhook.engine.loader_internals import LOADED, progress_bars_off
from billhook.engine.memory import fits, resident, streamed_size
from billhook.engine.parts import Parts, fingerprint, identity_of, replace_file
from billhook.engine.passes import (
    ActivationFiles,
    SideBySide,
    activation_files,
    blockwise,
    in_block_order,
    run_side_by_side,
    spilled_outputs,
    watch_call_order,
)
from billhook.engine.quantized import Quantization
from billhook.engine.sharded_files import (
    TENSORS,
    DeferredTensor,
    is_sharded_checkpoint,
    read_non_tensors,
    read_sharded,
    write_sharded,
)
from billhook.engine.sharding import full_tensor, is_sharded, is_tensor_parallel, local, reshard, shard, sharded_as, sizes_only
from billhook.engine.state import (
    StepRandom,
    TorchState,
    cpu_by_default,
    evaluating,
    evaluating_without_grad,
    forked,
    fresh_autocast_cache,
    full_precision,
    one_thread,
    overridden,
    random_state,
    replaced,
    restored_modes,
    seed_random_state,
    seeded,
    set_random_state,
    set_torch_state,
    torch_state,
    uninterrupted,
    without_kernels,
)
from billhook.engine.statistics import ROWS, TOKENS, InputGram, InputNorms, Statistics, add_products
from billhook.engine.store import BlockStore, store_of
from billhook.engine.tensors import TensorFiles
from billhook.engine.trees import ModulesByName, tree_flatten, tree_leaves, tree_map_only, tree_unflatten
from billhook.engine.walk import (
    Arguments,
    Sequential,
    Site,
    Visitor,
    Walk,
    blocks_of,
    call_with_copies,
    find_sites,
    separable_blocks,
    with_exits,
)
from billhook.engine.zeros import zeros_by_name, zeros_of
