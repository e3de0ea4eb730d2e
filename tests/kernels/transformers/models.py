"""The tiny models of transformers that these tests run, one a family."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

VOCABULARY = 50
TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
TEXT |= {"num_attention_heads": 4, "vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
CAUSAL = TEXT | {"num_key_value_heads": 2}
HEADS = CAUSAL | {"head_dim": 8}
ENCODER = TEXT | {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
DEEPSEEK = TEXT | {"num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8}
DEEPSEEK |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
DEEPSEEK |= {"first_k_dense_replace": 2}
MODERNBERT = TEXT | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 8}
MODERNBERT |= {"num_hidden_layers": 3, "global_attn_every_n_layers": 3}
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": 5}
IMAGE |= {"image_size": 16, "patch_size": 4, "hidden_dropout_prob": 0.0}
CONVNEXT = {"hidden_sizes": [16, 24], "depths": [1, 2], "num_stages": 2, "num_labels": 5}
CONVNEXT |= {"patch_size": 2, "image_size": 16, "layer_scale_init_value": 0.5}

# name -> the config's class and values, and the model's
FAMILIES = {
    "llama": ("Llama", CAUSAL, "ForCausalLM"),
    "mistral": ("Mistral", CAUSAL | {"sliding_window": 9}, "ForCausalLM"),
    "qwen2": ("Qwen2", CAUSAL | {"tie_word_embeddings": True}, "ForCausalLM"),
    "qwen3": ("Qwen3", HEADS, "ForCausalLM"),
    "gemma2": ("Gemma2", HEADS | {"sliding_window": 9}, "ForCausalLM"),
    "gemma3": ("Gemma3Text", HEADS | {"sliding_window": 9}, "ForCausalLM"),
    "phi3": ("Phi3", CAUSAL, "ForCausalLM"),
    "phi3 partial": ("Phi3", CAUSAL | {"rope_parameters": PARTIAL}, "ForCausalLM"),
    "smollm3": ("SmolLM3", CAUSAL | {"no_rope_layers": [1, 0]}, "ForCausalLM"),
    "granite": ("Granite", CAUSAL, "ForCausalLM"),
    "gpt2": ("GPT2", GPT2, "ForCausalLM"),
    "gpt_oss": ("GptOss", HEADS | {"num_local_experts": 2, "num_experts_per_tok": 1},
                "ForCausalLM"),
    "deepseek_v3": ("DeepseekV3", DEEPSEEK, "ForCausalLM"),  # heads of another size for values
    "bert": ("Bert", ENCODER, "ForMaskedLM"),
    "modernbert": ("ModernBert", MODERNBERT, "ForMaskedLM"),
    "vit": ("ViT", IMAGE | {"intermediate_size": 48}, "ForImageClassification"),
    "dinov2": ("Dinov2", IMAGE, "ForImageClassification"),
    "dinov2 swiglu": ("Dinov2", IMAGE | {"use_swiglu_ffn": True}, "ForImageClassification"),
    "convnext": ("ConvNext", CONVNEXT, "ForImageClassification"),
}  # fmt: skip


def tiny(family="llama", dtype=torch.float32, draw=0, **changes):
    """A model in training.

    draw: the number of its random weights.
    changes: of the config's values.
    """
    torch.manual_seed(draw)
    config, values, head = FAMILIES[family]
    config = getattr(transformers, f"{config}Config")(**(values | changes))
    model = getattr(transformers, f"AutoModel{head}").from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases would begin at 1 and 0, where errors hide
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.train()
