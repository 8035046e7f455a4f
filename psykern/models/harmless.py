"""The keys of ``config.json`` that change no log-probability, whatever they say.

The rule: a key that the family does not read and that does not stand here is refused, as it may stand for arithmetic
that psykern does not know. Compiled from the configs of the study's models and of those that trl, axolotl, unsloth,
LLaMA-Factory and Liger save, and from the attributes of transformers' ``PreTrainedConfig`` (4 and 5), with which Llama
3.2 Vision was published in full. Nobody needs to obey a key that is ``null``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from psykern.models.fields import Fields
from psykern.models.names import matches

# Names and patterns.
_HARMLESS = (
    # Tokens
    *("*_token_id", "*_token_ids", "*_token_index", "bos_token", "eos_token", "pad_token", "image_token"),
    *("tokenizer_*", "padding_side"),
    # Training: drawn numbers, losses, memory
    *("*dropout*", "*_pdrop", "initializer_*", "gradient_checkpointing", "output_router_logits", "*_loss_coef"),
    *("pretraining_tp", "loss_type", "use_liger_kernel", "finetuning_task", "problem_type", "task_specific_params"),
    *("id2label", "label2id", "num_labels"),
    # Who wrote the file, for which class and in which dtype
    *("_*", "unsloth_*", "transformers.js*", "transformers_version", "architectures", "auto_map", "name_or_path"),
    *("model_type", "torch_dtype", "dtype", "prefix", "base_model_name_or_path", "trust_remote_code"),
    # How it is computed, and what of it is handed out
    *("use_cache", "attn_implementation", "experts_implementation", "use_flash*", "flash_attn*", "torchscript"),
    *("use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "return_dict*", "output_attentions"),
    *("output_hidden_states", "output_scores", "output_logits", "tie_last_hidden_states", "is_decoder"),
    # Lengths that nobody computes with: what counts is max_position_embeddings
    *("model_max_length", "max_seq_len", "max_sequence_length"),
    # Text that a model writes, which is never asked for here
    *("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "do_sample", "num_beams"),
    *("num_beam_groups", "num_return_sequences", "max_length", "min_length", "max_new_tokens", "min_new_tokens"),
    *("early_stopping", "length_penalty", "repetition_penalty", "diversity_penalty", "penalty_alpha", "guidance_scale"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"),
    *("begin_suppress_tokens", "remove_invalid_values", "exponential_decay_length_penalty", "cache_implementation"),
    *("force_words_ids", "renormalize_logits", "encoder_repetition_penalty", "max_time", "generation_config"),
    # Tokens after the next one, which other tensors predict
    *("mtp_*", "num_nextn_predict_layers"),
    # One position for each of several axes is one position where there is no image
    "use_mrope",
    # Of families that have no windows in transformers either; the others read them
    *("sliding_window", "use_sliding_window", "max_window_layers"),
)
_HARMLESS_AS: Mapping[str, Any] = {  # with this value alone
    "pruned_heads": {},
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    # SmolLM2 is published with these two; the others say that something is not there which no family here has.
    "is_llama_config": True,
    "rope_interleaved": False,
    **dict.fromkeys(("bias", "mlp_bias", "use_bias", "qk_layernorm", "use_qk_norm", "use_logn_attn"), False),
    "use_dynamic_ntk": False,
}
_MAX_NAMED = 8


def is_harmless(key: str, value: object) -> bool:
    return matches(key, _HARMLESS) or (key in _HARMLESS_AS and _HARMLESS_AS[key] == value)


def refuse_unknown(c: Fields) -> None:
    """Raises ``CheckpointError`` for keys that nobody asked for and that may change what a model computes."""
    unknown = {key: value for key, value in c.not_asked().items() if not is_harmless(key, value)}
    if unknown:
        said = ", ".join(f"{key} ({value!r:.80})" for key, value in list(unknown.items())[:_MAX_NAMED])
        more = f" and {len(unknown) - _MAX_NAMED} more" if len(unknown) > _MAX_NAMED else ""
        raise c.error(
            f"{said}{more}: expected no key that psykern does not know, as it may change what the model computes; "
            "remove it where it changes nothing"
        )
