"""config.json of Llama, Mistral and Qwen in the form that the hub publishes, with exact parameter counts."""

_SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def _published(kind, architecture, version, shape, more):
    common = {
        "architectures": [architecture],
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "model_type": kind,
        "torch_dtype": "bfloat16",
        "transformers_version": version,
        "use_cache": True,
    }
    return common | dict(zip(_SHAPE, shape, strict=True)) | more


def llama2(*shape):
    theirs = {"vocab_size": 32000, "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2}
    theirs |= {"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False}
    return _published("llama", "LlamaForCausalLM", "4.31.0.dev0", shape, theirs)


def llama3(*shape, factor=None, reach=131072, tied=False, **more):
    theirs = {"vocab_size": 128256, "max_position_embeddings": reach, "bos_token_id": 128000, "eos_token_id": 128001}
    theirs |= {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "rms_norm_eps": 1e-05}
    theirs |= {"rope_scaling": None, "rope_theta": 500000.0, "tie_word_embeddings": tied}
    if factor:
        scaling = {"factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_type": "llama3"}
        theirs["rope_scaling"] = scaling | {"original_max_position_embeddings": 8192}
    return _published("llama", "LlamaForCausalLM", "4.43.0.dev0", shape, theirs | more)


def mistral(**more):
    theirs = {"max_position_embeddings": 32768, "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-05}
    theirs |= {"tie_word_embeddings": False}
    return _published("mistral", "MistralForCausalLM", "4.34.0.dev0", (32, 4096, 32, 8, 14336), theirs | more)


def qwen2(*shape, vocabulary=151936, reach=131072, tied=False, epsilon=1e-06):
    """`sliding_window` is there, and switched off."""
    theirs = {"vocab_size": vocabulary, "max_position_embeddings": reach, "rms_norm_eps": epsilon}
    theirs |= {"bos_token_id": 151643, "eos_token_id": 151643, "rope_theta": 1000000.0, "tie_word_embeddings": tied}
    theirs |= {"max_window_layers": shape[0], "sliding_window": reach, "use_sliding_window": False, "use_mrope": False}
    return _published("qwen2", "Qwen2ForCausalLM", "4.40.1", shape, theirs)


def qwen3(*shape, tied=False, **more):
    theirs = {"vocab_size": 151936, "max_position_embeddings": 32768, "rms_norm_eps": 1e-06, "head_dim": 128}
    theirs |= {"bos_token_id": 151643, "eos_token_id": 151643, "rope_theta": 1000000, "tie_word_embeddings": tied}
    theirs |= {"attention_bias": False, "max_window_layers": shape[0], "sliding_window": None, "rope_scaling": None}
    return _published("qwen3", "Qwen3ForCausalLM", "4.51.0", shape, theirs | {"use_sliding_window": False} | more)


OTHERS = {
    "llama-2-7b": (6_738_415_616, llama2(32, 4096, 32, 32, 11008)),
    "llama-2-13b": (13_015_864_320, llama2(40, 5120, 40, 40, 13824)),
    "llama-2-70b": (68_976_648_192, llama2(80, 8192, 64, 8, 28672)),
    "llama-3-8b": (8_030_261_248, llama3(32, 4096, 32, 8, 14336, reach=8192)),
    "llama-3-70b": (70_553_706_496, llama3(80, 8192, 64, 8, 28672, reach=8192)),
    "llama-3.1-8b": (8_030_261_248, llama3(32, 4096, 32, 8, 14336, factor=8.0)),
    "llama-3.1-70b": (70_553_706_496, llama3(80, 8192, 64, 8, 28672, factor=8.0)),
    "llama-3.2-1b": (1_235_814_400, llama3(16, 2048, 32, 8, 8192, factor=32.0, tied=True, head_dim=64)),
    "llama-3.2-3b": (3_212_749_824, llama3(28, 3072, 24, 8, 8192, factor=32.0, tied=True, head_dim=128)),
    "mistral-7b-v0.1": (7_241_732_096, mistral(vocab_size=32000, rope_theta=10000.0, sliding_window=4096)),
    "mistral-7b-v0.2": (7_241_732_096, mistral(vocab_size=32000, rope_theta=1000000.0, sliding_window=None)),
    "mistral-7b-v0.3": (7_248_023_552, mistral(vocab_size=32768, rope_theta=1000000.0, sliding_window=None)),
    "qwen-2.5-0.5b": (494_032_768, qwen2(24, 896, 14, 2, 4864, reach=32768, tied=True)),
    "qwen-2.5-1.5b": (1_543_714_304, qwen2(28, 1536, 12, 2, 8960, tied=True)),
    "qwen-2.5-3b": (3_085_938_688, qwen2(36, 2048, 16, 2, 11008, reach=32768, tied=True)),
    "qwen-2.5-7b": (7_615_616_512, qwen2(28, 3584, 28, 4, 18944, vocabulary=152064)),
    "qwen-2.5-14b": (14_770_033_664, qwen2(48, 5120, 40, 8, 13824, vocabulary=152064, epsilon=1e-05)),
    "qwen-2.5-32b": (32_763_876_352, qwen2(64, 5120, 40, 8, 27648, vocabulary=152064, epsilon=1e-05)),
    "qwen-2.5-72b": (72_706_203_648, qwen2(80, 8192, 64, 8, 29568, vocabulary=152064, epsilon=1e-05)),
    "qwen-3-0.6b": (596_049_920, qwen3(28, 1024, 16, 8, 3072, tied=True)),
    "qwen-3-1.7b": (1_720_574_976, qwen3(28, 2048, 16, 8, 6144, tied=True)),
    "qwen-3-4b": (4_022_468_096, qwen3(36, 2560, 32, 8, 9728, tied=True)),
    "qwen-3-8b": (8_190_735_360, qwen3(36, 4096, 32, 8, 12288)),
    "qwen-3-14b": (14_768_307_200, qwen3(40, 5120, 40, 8, 17408)),
    # The one that is published as a chat model only.
    "qwen-3-32b": (
        32_762_123_264,
        qwen3(64, 5120, 64, 8, 25600, eos_token_id=151645, max_position_embeddings=40960),
    ),
}
