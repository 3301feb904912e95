"""Text models of transformers: encoders, decoders, mixtures of experts, state spaces, encoder-decoders."""

from typing import Any

import torch

from tests.models import BATCH, LENGTH, VOCABULARY, classification, generation, sequences
from tests.zoo.entry import Entry, Inputs
from tests.zoo.tiny import (
    HEADS,
    HIDDEN,
    INNER,
    LAYERS,
    SPECIAL,
    masked_words,
    plain_generation,
    tiny,
    token_classification,
    translation,
)

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": INNER, "max_position_embeddings": 32, "initializer_range": 0.2, **SPECIAL,
}  # fmt: skip
CLASSIFIER = {**SIZES, "num_labels": 3}
GROUPED = {**SIZES, "num_key_value_heads": 2}
SINGLE = {"problem_type": "single_label_classification"}
SCAN = {"shapes": "the scan is a Python loop over the length"}
CHUNKS = "the number of attention windows is read from a tensor (torch.div on a size)"
# for a last layer that draws dropout for states which nothing reads: the graph draws none
UNDROPPED = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
GPT2 = {
    "vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "n_positions": 32, "n_inner": INNER,
    "initializer_range": 0.2, **SPECIAL,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER,
    "decoder_ffn_dim": INNER, "max_position_embeddings": 32, "init_std": 0.2, "decoder_start_token_id": 2,
    "forced_eos_token_id": 2, **SPECIAL,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 6, "d_ff": INNER, "num_layers": LAYERS, "num_heads": HEADS,
    "decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16,
    "initializer_factor": 0.5, **SPECIAL,
}  # fmt: skip


def encoder(name: str, architecture: str, config: dict[str, Any], inputs=classification, **options: Any) -> Entry:
    return tiny(name, "encoder", architecture, inputs, {**CLASSIFIER, **config}, **options)


def decoder(name: str, architecture: str, config: dict[str, Any], inputs=generation, **options: Any) -> Entry:
    return tiny(name, "decoder", architecture, inputs, {**GROUPED, **config}, **options)


def experts(name: str, architecture: str, config: dict[str, Any], **options: Any) -> Entry:
    return tiny(name, "moe", architecture, generation, {**GROUPED, **config}, **{"experts": "grouped_mm", **options})


def recurrent(name: str, architecture: str, config: dict[str, Any], inputs=plain_generation, **options: Any) -> Entry:
    return tiny(name, "state space", architecture, inputs, {**SIZES, **config}, **options)


def seq2seq(name: str, architecture: str, config: dict[str, Any], inputs=translation, **options: Any) -> Entry:
    return tiny(name, "encoder-decoder", architecture, inputs, config, **options)


def boxes() -> Inputs:
    """Token ids with the box of every token on its page."""
    corners = torch.randint(0, 16, (BATCH, LENGTH, 2))
    return {**classification(), "bbox": torch.cat([corners, corners + torch.randint(0, 16, (BATCH, LENGTH, 2))], -1)}


def spans() -> Inputs:
    return {**sequences(), "start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([2, 3, 4])}


ENCODERS = [
    encoder("bert", "BertForSequenceClassification", {}),
    encoder("roberta", "RobertaForTokenClassification", {}, token_classification),
    encoder("xlm-roberta", "XLMRobertaForQuestionAnswering", {"num_labels": 2}, spans),
    encoder("distilbert", "DistilBertForSequenceClassification",
            {"dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": INNER, **SINGLE}),
    encoder("albert", "AlbertForSequenceClassification", {"embedding_size": 16}, fast=True),
    encoder("electra", "ElectraForSequenceClassification", {"embedding_size": 16}),
    encoder("deberta", "DebertaForSequenceClassification",
            {"relative_attention": True, "max_relative_positions": 8, "pos_att_type": ["c2p", "p2c"], **SINGLE}),
    encoder("deberta-v2", "DebertaV2ForSequenceClassification",
            {"relative_attention": True, "share_att_key": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4,
             "max_relative_positions": 8, "conv_kernel_size": 3, "conv_act": "gelu", **SINGLE}),
    encoder("mpnet", "MPNetForMaskedLM", {}, masked_words),
    encoder("camembert", "CamembertForMaskedLM", {}, masked_words),
    encoder("ernie", "ErnieForSequenceClassification", {"use_task_id": True, "task_type_vocab_size": 3}),
    encoder("rembert", "RemBertForSequenceClassification",
            {"input_embedding_size": 16, "output_embedding_size": 20}),
    tiny("xlnet", "encoder", "XLNetForSequenceClassification", classification,
         {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "d_inner": INNER,
          "initializer_range": 0.2, "num_labels": 3, "use_mems_eval": False, **SPECIAL}),
    tiny("funnel", "encoder", "FunnelForSequenceClassification", classification,
         {"vocab_size": VOCABULARY, "d_model": HIDDEN, "n_head": HEADS, "d_head": 6, "d_inner": INNER,
          "block_sizes": [1, 1], "num_labels": 3, **SPECIAL},
         limits={"shapes": "relative positions are Python lists over the length"}),
    encoder("convbert", "ConvBertForSequenceClassification", {"embedding_size": 16, "conv_kernel_size": 3}),
    encoder("squeezebert", "SqueezeBertForSequenceClassification", {"embedding_size": HIDDEN}),
    encoder("mobilebert", "MobileBertForSequenceClassification",
            {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16, "num_feedforward_networks": 2}),
    encoder("fnet", "FNetForMaskedLM", {}, lambda: {k: v for k, v in masked_words().items() if k != "attention_mask"}),
    encoder("nystromformer", "NystromformerForSequenceClassification",
            {"num_landmarks": 4, "segment_means_seq_len": 4, "conv_kernel_size": 3}),
    encoder("bigbird", "BigBirdForSequenceClassification", {"attention_type": "original_full"}),
    encoder("longformer", "LongformerForSequenceClassification", {"attention_window": 4},
            limits={"capture": CHUNKS}),
    encoder("roformer", "RoFormerForSequenceClassification", {"embedding_size": 16}),
    encoder("layoutlm", "LayoutLMForTokenClassification", {"max_2d_position_embeddings": 32},
            lambda: {**boxes(), "labels": torch.randint(0, 3, (BATCH, LENGTH))}),
    encoder("lilt", "LiltForSequenceClassification",
            {"max_2d_position_embeddings": 32, "channel_shrink_ratio": 2, **UNDROPPED}, boxes),
    encoder("modernbert", "ModernBertForSequenceClassification",
            {"local_attention": 4, "global_attn_every_n_layers": 2}),
    encoder("eurobert", "EuroBertForMaskedLM", {"num_key_value_heads": 2, "mask_token_id": 4}, masked_words),
    encoder("nomic-bert", "NomicBertForSequenceClassification", {}),
    encoder("esm", "EsmForMaskedLM", {"position_embedding_type": "rotary", "mask_token_id": 4}, masked_words),
    encoder("flaubert", "FlaubertForSequenceClassification",
            {"n_words": VOCABULARY, "emb_dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS}),
    encoder("ibert", "IBertForSequenceClassification", {}, limits={"capture": "asserts on tensor values"}),
    encoder("megatron-bert", "MegatronBertForSequenceClassification", {}),
    encoder("canine", "CanineForTokenClassification",
            {"downsampling_rate": 2, "upsampling_kernel_size": 2, "local_transformer_stride": 4, "num_hash_buckets": 31,
             "num_hash_functions": 4}, token_classification,
            limits={"shapes": "chunks of the sequence are cut by a Python loop over its length"}),
    encoder("yoso", "YosoForSequenceClassification", {"use_expectation": True},
            limits={"capture": "torch.export replaces an autograd.Function with a backward of its own by its forward"}),
    encoder("perceiver", "PerceiverForSequenceClassification",
            {"d_model": HIDDEN, "d_latents": 16, "num_latents": 5, "num_blocks": 1, "num_self_attends_per_block": 2,
             "num_self_attention_heads": 2, "num_cross_attention_heads": 2},
            lambda: {("inputs" if k == "input_ids" else k): v for k, v in classification().items()}),
]  # fmt: skip

DECODERS = [
    tiny("gpt2", "decoder", "GPT2LMHeadModel", generation, GPT2),
    tiny("gpt-bigcode", "decoder", "GPTBigCodeForCausalLM", generation, GPT2),
    tiny("gptj", "decoder", "GPTJForCausalLM", generation, {**GPT2, "rotary_dim": 4}),
    tiny("codegen", "decoder", "CodeGenForCausalLM", generation, {**GPT2, "rotary_dim": 4}),
    tiny("openai-gpt", "decoder", "OpenAIGPTLMHeadModel", generation, GPT2),
    decoder("gpt-neo", "GPTNeoForCausalLM",
            {"num_layers": LAYERS, "num_heads": HEADS, "attention_types": [[["global", "local"], 1]],
             "window_size": 4}),
    decoder("gpt-neox", "GPTNeoXForCausalLM", {"hidden_size": 32, "rotary_pct": 0.5}),
    decoder("opt", "OPTForCausalLM", {"ffn_dim": INNER, "word_embed_proj_dim": 16}),
    decoder("bloom", "BloomForCausalLM", {"n_layer": LAYERS, "n_head": HEADS}),
    decoder("falcon", "FalconForCausalLM", {"num_kv_heads": 2, "new_decoder_architecture": True}),
    decoder("falcon-alibi", "FalconForCausalLM", {"alibi": True, "multi_query": True, "parallel_attn": True},
            limits={"onnx": "its slopes are bfloat16, for which onnxruntime has no Mul kernel on the CPU"}),
    decoder("mpt", "MptForCausalLM", {"d_model": HIDDEN, "n_heads": HEADS, "n_layers": LAYERS, "max_seq_len": 32}),
    decoder("xglm", "XGLMForCausalLM",
            {"d_model": HIDDEN, "num_layers": LAYERS, "attention_heads": HEADS, "ffn_dim": INNER}),
    decoder("biogpt", "BioGptForCausalLM", {}),
    decoder("llama", "LlamaForCausalLM", {}),
    decoder("llama-tied", "LlamaForCausalLM", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    decoder("mistral", "MistralForCausalLM", {"sliding_window": 4}),
    decoder("qwen2", "Qwen2ForCausalLM", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    decoder("qwen3", "Qwen3ForCausalLM", {"head_dim": 8}),
    decoder("gemma", "GemmaForCausalLM", {"head_dim": 8}),
    decoder("gemma2", "Gemma2ForCausalLM", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    decoder("gemma3", "Gemma3ForCausalLM", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    decoder("phi", "PhiForCausalLM", {"hidden_size": 32, "partial_rotary_factor": 0.5}),
    decoder("phi3", "Phi3ForCausalLM", {"sliding_window": 4}),
    decoder("stablelm", "StableLmForCausalLM",
            {"hidden_size": 32, "partial_rotary_factor": 0.5, "qk_layernorm": True}),
    decoder("cohere", "CohereForCausalLM", {"use_qk_norm": True}),
    decoder("cohere2", "Cohere2ForCausalLM", {"sliding_window": 4}),
    decoder("olmo", "OlmoForCausalLM", {"clip_qkv": 2.0}),
    decoder("olmo2", "Olmo2ForCausalLM", {}),
    decoder("starcoder2", "Starcoder2ForCausalLM", {"sliding_window": 4}),
    decoder("smollm3", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
    decoder("granite", "GraniteForCausalLM", {"residual_multiplier": 0.5, "logits_scaling": 2.0}),
    decoder("glm4", "Glm4ForCausalLM", {"head_dim": 8}),
    decoder("nemotron", "NemotronForCausalLM", {}),
    decoder("helium", "HeliumForCausalLM", {"head_dim": 6}),
    decoder("exaone4", "Exaone4ForCausalLM", {"sliding_window": 4, "sliding_window_pattern": 2}),
    decoder("persimmon", "PersimmonForCausalLM", {"hidden_size": 32, "num_key_value_heads": HEADS}),
    decoder("ctrl", "CTRLLMHeadModel", {"n_embd": HIDDEN, "dff": INNER, "n_layer": LAYERS, "n_head": HEADS,
                                        "n_positions": 32}),
]  # fmt: skip

MIXTURES = [
    experts("mixtral", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}, fast=True),
    experts("mixtral-batched", "MixtralForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2},
            experts="batched_mm"),
    experts("qwen2-moe", "Qwen2MoeForCausalLM",
            {"moe_intermediate_size": 12, "shared_expert_intermediate_size": 20, "num_experts": 4,
             "num_experts_per_tok": 2}),
    experts("qwen3-moe", "Qwen3MoeForCausalLM",
            {"head_dim": 8, "moe_intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2}),
    experts("olmoe", "OlmoeForCausalLM", {"num_experts": 4, "num_experts_per_tok": 2}),
    experts("granitemoe", "GraniteMoeForCausalLM", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    experts("gpt-oss", "GptOssForCausalLM",
            {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    experts("deepseek-v3", "DeepseekV3ForCausalLM",
            {"moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2,
             "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4,
             "qk_nope_head_dim": 4, "v_head_dim": 6, "n_shared_experts": 1, "num_key_value_heads": HEADS}),
]  # fmt: skip

STATE_SPACES = [
    recurrent("mamba", "MambaForCausalLM", {"state_size": 4, "time_step_rank": 3, "expand": 2},
              limits=SCAN),
    # lengths that fill their last chunk take another way in the model, and so have a graph of their own
    recurrent("mamba2", "Mamba2ForCausalLM",
              {"state_size": 4, "head_dim": 12, "num_heads": 4, "expand": 2, "n_groups": 2, "chunk_size": 5}),
    recurrent("rwkv", "RwkvForCausalLM", {"attention_hidden_size": HIDDEN, "context_length": 32},
              limits=SCAN),
    recurrent("recurrent-gemma", "RecurrentGemmaForCausalLM",
              {"num_key_value_heads": 2, "head_dim": 6, "lru_width": HIDDEN, "attention_window_size": 4,
               "block_types": ["recurrent", "attention"]}, limits=SCAN),
]  # fmt: skip

ENCODER_DECODERS = [
    seq2seq("t5", "T5ForConditionalGeneration", T5),
    seq2seq("t5-gated", "T5ForConditionalGeneration",
            {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    seq2seq("mt5", "MT5ForConditionalGeneration", T5),
    seq2seq("bart", "BartForConditionalGeneration", BART, fast=True),
    seq2seq("mbart", "MBartForConditionalGeneration", BART),
    seq2seq("pegasus", "PegasusForConditionalGeneration", BART),
    seq2seq("marian", "MarianMTModel", {**BART, "decoder_vocab_size": VOCABULARY}),
    seq2seq("m2m100", "M2M100ForConditionalGeneration",
            {**BART, "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}),
    seq2seq("blenderbot", "BlenderbotForConditionalGeneration", BART),
    seq2seq("plbart", "PLBartForConditionalGeneration", BART),
    seq2seq("led", "LEDForConditionalGeneration",
            {**BART, "attention_window": 4, "max_encoder_position_embeddings": 32,
             "max_decoder_position_embeddings": 32}, limits={"capture": CHUNKS}),
    seq2seq("prophetnet", "ProphetNetForConditionalGeneration",
            {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_encoder_layers": LAYERS,
             "num_decoder_layers": LAYERS, "num_encoder_attention_heads": HEADS, "num_decoder_attention_heads": HEADS,
             "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "max_position_embeddings": 32, "ngram": 2,
             "num_buckets": 8, "relative_max_distance": 16, "init_std": 0.2, **SPECIAL}),
]  # fmt: skip

ENTRIES: list[Entry] = [*ENCODERS, *DECODERS, *MIXTURES, *STATE_SPACES, *ENCODER_DECODERS]
