"""The ``config.json`` of models that see as they were published or saved, and what transformers made of them.

Copied from public repositories that hold them in full: Qwen2.5-VL-7B as it came (transformers 4.49) and as 4.54 saved
it, Qwen3-VL-2B, Llama-3.2-11B-Vision with every attribute of ``PretrainedConfig``. Vision configs are cut short.
"""

from __future__ import annotations

from typing import Any

TOKENS = {"vision_start_token_id": 151652, "vision_end_token_id": 151653, "vision_token_id": 151654}
QWEN2_5_TEXT: dict[str, Any] = {
    **{"attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151645, "hidden_act": "silu"},
    **{"hidden_size": 3584, "initializer_range": 0.02, "intermediate_size": 18944, "max_position_embeddings": 128000},
    **{"max_window_layers": 28, "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4},
    **{"rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "use_cache": True, "use_sliding_window": False},
    **{"vocab_size": 152064, **TOKENS},
}
QWEN2_5_ROOT: dict[str, Any] = {
    **{"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl", "image_token_id": 151655},
    **{"video_token_id": 151656, "tie_word_embeddings": False, "torch_dtype": "bfloat16", **TOKENS},
    "vision_config": {"hidden_size": 1280, "in_chans": 3, "model_type": "qwen2_5_vl", "spatial_patch_size": 14},
}
SECTIONS = {"mrope_section": [16, 24, 24]}
AS_SAVED = {"rope_scaling": {**SECTIONS, "rope_type": "default", "type": "default"}}

CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen2.5-VL-7B": {
        **{**QWEN2_5_ROOT, **QWEN2_5_TEXT, "sliding_window": 32768, "transformers_version": "4.49.0"},
        "rope_scaling": {"type": "mrope", **SECTIONS},
    },
    "Qwen2.5-VL-7B-saved-by-4.54": {
        **{**QWEN2_5_ROOT, **QWEN2_5_TEXT, **AS_SAVED, "sliding_window": 32768, "transformers_version": "4.54.0"},
        "text_config": {
            **{**QWEN2_5_TEXT, **AS_SAVED, "sliding_window": None, "image_token_id": None, "video_token_id": None},
            **{"layer_types": ["full_attention"] * 28, "model_type": "qwen2_5_vl_text", "torch_dtype": "float32"},
        },
    },
    "Qwen2.5-VL-7B-saved-by-5": {
        **QWEN2_5_ROOT,
        "text_config": {
            **{key: value for key, value in QWEN2_5_TEXT.items() if key not in ("rope_theta", "vision_token_id")},
            **{"layer_types": ["full_attention"] * 28, "model_type": "qwen2_5_vl_text", "sliding_window": None},
            "rope_parameters": {**SECTIONS, "rope_theta": 1000000.0, "rope_type": "default", "type": "mrope"},
        },
    },
    "Qwen3-VL-2B": {
        **{"architectures": ["Qwen3VLForConditionalGeneration"], "image_token_id": 151655, "model_type": "qwen3_vl"},
        "text_config": {
            **{"attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 151643, "dtype": "bfloat16"},
            **{"eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048},
            **{"initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 262144},
            **{"model_type": "qwen3_vl_text", "num_attention_heads": 16, "num_hidden_layers": 28},
            **{"num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_theta": 5000000, "tie_word_embeddings": True},
            "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
            **{"use_cache": True, "vocab_size": 151936},
        },
        **{"tie_word_embeddings": True, "transformers_version": "4.57.0.dev0", "video_token_id": 151656},
        "vision_config": {"deepstack_visual_indexes": [5, 11, 17], "depth": 24, "model_type": "qwen3_vl"},
        **{"vision_end_token_id": 151653, "vision_start_token_id": 151652},
    },
    "Llama-3.2-11B-Vision": {
        **{"architectures": ["MllamaForConditionalGeneration"], "image_token_index": 128256, "model_type": "mllama"},
        "text_config": {
            **{"_attn_implementation_autoset": False, "_name_or_path": "", "add_cross_attention": False},
            **{"architectures": None, "bad_words_ids": None, "begin_suppress_tokens": None, "bos_token_id": 128000},
            **{"chunk_size_feed_forward": 0, "cross_attention_hidden_size": None, "decoder_start_token_id": None},
            **{"cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "diversity_penalty": 0.0, "do_sample": False},
            **{"dropout": 0, "early_stopping": False, "encoder_no_repeat_ngram_size": 0, "eos_token_id": [128001]},
            **{"exponential_decay_length_penalty": None, "finetuning_task": None, "forced_bos_token_id": None},
            **{"forced_eos_token_id": None, "hidden_act": "silu", "hidden_size": 4096},
            **{"id2label": {"0": "LABEL_0", "1": "LABEL_1"}, "initializer_range": 0.02, "intermediate_size": 14336},
            **{"is_decoder": False, "is_encoder_decoder": False, "label2id": {"LABEL_0": 0, "LABEL_1": 1}},
            **{"length_penalty": 1.0, "max_length": 20, "max_position_embeddings": 131072, "min_length": 0},
            **{"model_type": "mllama_text_model", "no_repeat_ngram_size": 0, "num_attention_heads": 32},
            **{"num_beam_groups": 1, "num_beams": 1, "num_hidden_layers": 40, "num_key_value_heads": 8},
            **{"num_return_sequences": 1, "output_attentions": False, "output_hidden_states": False},
            **{"output_scores": False, "pad_token_id": 128004, "prefix": None, "problem_type": None},
            **{"pruned_heads": {}, "remove_invalid_values": False, "repetition_penalty": 1.0, "return_dict": True},
            **{"return_dict_in_generate": False, "rms_norm_eps": 1e-05, "rope_theta": 500000.0},
            "rope_scaling": {
                **{"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
                **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
            },
            **{"sep_token_id": None, "suppress_tokens": None, "task_specific_params": None, "temperature": 1.0},
            **{"tf_legacy_loss": False, "tie_encoder_decoder": False, "tie_word_embeddings": False},
            **{"tokenizer_class": None, "top_k": 50, "top_p": 1.0, "torch_dtype": "bfloat16", "torchscript": False},
            **{"typical_p": 1.0, "use_bfloat16": False, "use_cache": True, "vocab_size": 128256},
        },
        **{"torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0"},
        "vision_config": {"attention_heads": 16, "hidden_size": 1280, "model_type": "mllama_vision_model"},
    },
}
