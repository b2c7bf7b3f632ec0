"""Finds, builds, and changes Hugging Face models: tensors, shapes, and configs."""

from billhook.model.cache import CachedShapes, cached, signature
from billhook.model.checkpoint_shape import Checkpoint, load_shape, save_shape
from billhook.model.complete import check_shards, load_complete
from billhook.model.config_fields import (
    Fields,
    build_class_on_meta,
    build_on_meta,
    configs_of,
    field,
    fields_of,
    nested_configs,
    set_fields,
    text_config,
    with_fields,
)
from billhook.model.constants import record_constants, set_constants
from billhook.model.costs import Costs, cost_of, costs_of, kv_cache_bytes, meta_copy
from billhook.model.experts import ExpertLinear, after_norm, expert_layers, holder_of, routed, stacks_of
from billhook.model.field_search import Built, Sizes, build, find_fields
from billhook.model.find import check_changeable, check_dense, check_plain, check_stored, check_values, find_transformer
from billhook.model.inputs import cached_outputs, make_inputs, outputs_match, run_outputs, small_inputs, tolerance
from billhook.model.layers import (
    PRUNED,
    Convolution,
    Convolutions,
    active_in,
    adjacent_inputs,
    base_of,
    batched,
    channels_of,
    find_tied,
    is_adapter,
    is_convolution,
    is_linear,
    is_pruned,
    is_trained_copy,
    matrix_of,
    output_positions,
    patches,
    prunable,
    read_dim,
    size_of,
    sparse_support,
    stored_name,
    to_layout,
    to_parameters,
    view_in,
    weight_holders,
    weight_of,
    weight_view,
)
from billhook.model.meta import check_checkpoint, from_config, from_name, model_class, read_config, stand_ins_in, to_meta
from billhook.model.plan import (
    ModelPlan,
    ShapePlan,
    Weights,
    apply,
    apply_plan,
    check_weights,
    subclasses,
    with_weights,
    without_inference_tensors,
)
from billhook.model.preprocessors import (
    FILES,
    LOST_TOKENS,
    TRIMMED,
    Preprocessor,
    check_ids,
    check_tokenizer,
    load_preprocessor,
    load_tokenizer,
    may_have_preprocessor,
    tokenizer_of,
    vocabulary_fingerprint,
)
from billhook.model.rotary import (
    RopeParameters,
    are_rope_parameters,
    longrope,
    rope_parameters,
    rotary_embeddings,
    rotating_with,
    with_modules,
    with_rope_parameters,
)
from billhook.model.shape import (
    FLAG,
    GROUPS,
    KEY,
    Shape,
    block_numbers,
    built_shape,
    changed_constants,
    keep_blocks,
    record_shape,
    set_shape,
    shape_beyond_config,
    shape_of,
    to_entry,
)
from billhook.model.shaped import build_shaped, has_shape_entry, load_as, load_shaped, readable
from billhook.model.streamed import check_called_once, load_streamed, outline, raise_called_again, stream
from billhook.model.surgery import (
    Change,
    Swap,
    UpdateOptimizers,
    change_blockwise,
    change_values,
    changed_names,
    check_replaceable,
    check_unhooked,
    restored_on_error,
    snapshot,
    snapshot_with_store,
    update_optimizers,
    values_restored_on_error,
)
from billhook.model.token_ids import named_token_ids, renumber_generation_config, with_kept_tokens
from billhook.model.transformers_internals import (
    attention_for_all_dtypes,
    attention_functions_as,
    attention_of,
    build_class,
    classes_of,
    compute_every_expert,
    compute_experts_eagerly,
    has_sdpa,
    match_implementations,
    set_attention,
)
