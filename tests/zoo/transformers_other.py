"""Vision, audio and multimodal models of transformers."""

from typing import Any

import torch

from tests.models import BATCH, LENGTH, VOCABULARY
from tests.zoo.entry import Entry, Inputs
from tests.zoo.tiny import HEADS, HIDDEN, INNER, LAYERS, SPECIAL, images, labelled_images, tiny

VIT = {
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": INNER,
    "image_size": 32, "patch_size": 8, "num_labels": 3, "initializer_range": 0.2,
}  # fmt: skip
LABELS = {"num_labels": 3}
SPEECH = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": INNER, "conv_dim": (16, 16), "conv_kernel": (10, 3), "conv_stride": (5, 2),
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16, "num_labels": 3, "apply_spec_augment": False, "layerdrop": 0.0,
}  # fmt: skip
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "intermediate_size": INNER, "max_position_embeddings": 32, **SPECIAL,
}  # fmt: skip
VISION = {key: VIT[key] for key in VIT if key not in ("num_labels", "initializer_range")}


def vision(name: str, architecture: str, config: dict[str, Any], inputs=None, **options: Any) -> Entry:
    return tiny(name, "vision", architecture, inputs or labelled_images(), config, **options)


def audio(name: str, architecture: str, config: dict[str, Any], inputs=None, **options: Any) -> Entry:
    return tiny(name, "audio", architecture, inputs or waves, config, **options)


def both(name: str, architecture: str, config: dict[str, Any], inputs=None, **options: Any) -> Entry:
    return tiny(name, "multimodal", architecture, inputs or pairs, config, **options)


def waves() -> Inputs:
    return {"input_values": torch.randn(BATCH, 400), "labels": torch.arange(BATCH) % 3}


def spectra() -> Inputs:
    """Log-mel spectra of a fixed length, and text."""
    labels = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    return {"input_features": torch.randn(BATCH, 8, 40), "decoder_input_ids": labels.roll(1, 1), "labels": labels}


def words(length: int = LENGTH) -> Inputs:
    """Token ids that end with the end of the sequence, which contrastive models look for."""
    ids = torch.randint(3, VOCABULARY - 1, (BATCH, length))
    ids[:, -1] = SPECIAL["eos_token_id"]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def unpaired() -> Inputs:
    return {**words(), **images()()}


def pairs() -> Inputs:
    return {**unpaired(), "return_loss": True}


def pictures(length: int = LENGTH) -> Inputs:
    """Text after one image, which has the place of 16 tokens."""
    text, place = words(length), torch.full((BATCH, 16), VOCABULARY - 1)
    ids = torch.cat([place, text["input_ids"]], 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **images()(), "labels": ids.clone()}


def segments() -> Inputs:
    return {**images()(), "labels": torch.randint(0, 3, (BATCH, 32, 32))}


IMAGE_MODELS = [
    vision("vit", "ViTForImageClassification", VIT),
    vision("deit", "DeiTForImageClassification", VIT),
    vision("beit", "BeitForImageClassification",
           {**VIT, "use_relative_position_bias": True, "layer_scale_init_value": 0.5}),
    vision("data2vec-vision", "Data2VecVisionForImageClassification",
           {**VIT, "use_shared_relative_position_bias": True}),
    vision("swin", "SwinForImageClassification",
           {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
            "window_size": 4, "initializer_range": 0.2, **LABELS}),
    vision("swinv2", "Swinv2ForImageClassification",
           {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4],
            "window_size": 4, "initializer_range": 0.2, **LABELS}),
    vision("convnext", "ConvNextForImageClassification",
           {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, "drop_path_rate": 0.1, **LABELS}),
    vision("convnextv2", "ConvNextV2ForImageClassification",
           {"hidden_sizes": [16, 24], "depths": [1, 1], "num_stages": 2, **LABELS}),
    vision("segformer", "SegformerForSemanticSegmentation",
           {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 24],
            "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2],
            "decoder_hidden_size": 16, **LABELS}, segments),
    vision("mobilevit", "MobileViTForImageClassification",
           {"image_size": 32, "hidden_sizes": [16, 20, 24], "neck_hidden_sizes": [8, 8, 16, 16, 20, 24, 32],
            "num_attention_heads": 2, **LABELS}, labelled_images(64)),
    vision("mobilevitv2", "MobileViTV2ForImageClassification",
           {"image_size": 64, "width_multiplier": 0.25, "n_attn_blocks": [1, 1, 1],
            "base_attn_unit_dims": [32, 48, 64], **LABELS}, labelled_images(64)),
    vision("resnet", "ResNetForImageClassification",
           {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1], "layer_type": "basic", **LABELS},
           fast=True),
    vision("regnet", "RegNetForImageClassification",
           {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8, **LABELS}),
    vision("bit", "BitForImageClassification",
           {"embedding_size": 32, "hidden_sizes": [128, 256], "depths": [1, 1], "num_groups": 4, **LABELS},
           limits={"onnx": "onnxruntime's Pad_Fusion drops the zeros in front of a maximum pool"}),
    vision("mobilenet-v1", "MobileNetV1ForImageClassification",
           {"depth_multiplier": 0.25, "image_size": 64, "classifier_dropout_prob": 0.1, **LABELS}, labelled_images(64)),
    vision("mobilenet-v2", "MobileNetV2ForImageClassification",
           {"depth_multiplier": 0.25, "image_size": 32, "classifier_dropout_prob": 0.1, **LABELS}),
    vision("efficientnet", "EfficientNetForImageClassification",
           {"image_size": 32, "width_coefficient": 0.25, "depth_coefficient": 0.1, "hidden_dim": 320, **LABELS}),
    vision("dinov2", "Dinov2ForImageClassification", {**VIT, "mlp_ratio": 2, "layerscale_value": 0.5}),
    vision("dinov2-registers", "Dinov2WithRegistersForImageClassification", {**VIT, "mlp_ratio": 2}),
    vision("dinov3", "DINOv3ViTModel", {**VIT, "hidden_size": 32, "num_register_tokens": 2}, images()),
    vision("poolformer", "PoolFormerForImageClassification",
           {"hidden_sizes": [8, 16], "depths": [1, 1], "num_encoder_blocks": 2, "patch_sizes": [7, 3],
            "strides": [4, 2], "padding": [2, 1], "mlp_ratio": 2.0, **LABELS}),
    vision("pvt", "PvtForImageClassification",
           {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1],
            "hidden_sizes": [16, 24], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [2, 4],
            "mlp_ratios": [2, 2], **LABELS}),
    vision("levit", "LevitForImageClassification",
           {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
            "key_dim": [4, 4, 4], **LABELS},
           lambda: {"pixel_values": torch.randn(12, 3, 64, 64), "labels": torch.arange(12) % 3}),
    vision("cvt", "CvtForImageClassification",
           {"embed_dim": [16, 16, 24], "num_heads": [1, 2, 2], "depth": [1, 2, 3], **LABELS}),
    vision("focalnet", "FocalNetForImageClassification",
           {"image_size": 32, "patch_size": 4, "embed_dim": 16, "hidden_sizes": [16, 24], "depths": [1, 1],
            "focal_levels": [2, 2], "focal_windows": [3, 3], **LABELS}),
    vision("dpt", "DPTForSemanticSegmentation",
           {**VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 8, 16, 16],
            "fusion_hidden_size": 16, "reassemble_factors": [4, 2, 1, 0.5], "is_hybrid": False}, segments),
    vision("vit-mae", "ViTMAEForPreTraining",
           {**VIT, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 24},
           lambda: {**images()(), "noise": torch.rand(BATCH, 16)}),
    vision("yolos", "YolosModel", {**VIT, "image_size": [32, 32], "num_detection_tokens": 5}, images()),
    vision("detr", "DetrModel",
           {"d_model": HIDDEN, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER, "decoder_ffn_dim": INNER, "num_queries": 5,
            "use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None,
            "backbone_config": {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [16, 24],
                                "depths": [1, 1], "layer_type": "basic", "out_features": ["stage2"]}}, images(),
           limits={"capture": "the encoder branches on whether its values are finite"}),
    vision("vivit", "VivitForVideoClassification", {**VIT, "num_frames": 4, "tubelet_size": [2, 8, 8]},
           lambda: {"pixel_values": torch.randn(BATCH, 4, 3, 32, 32), "labels": torch.arange(BATCH) % 3}),
    vision("timesformer", "TimesformerForVideoClassification", {**VIT, "num_frames": 4},
           lambda: {"pixel_values": torch.randn(BATCH, 4, 3, 32, 32), "labels": torch.arange(BATCH) % 3}),
]  # fmt: skip

AUDIO_MODELS = [
    audio("wav2vec2", "Wav2Vec2ForSequenceClassification", SPEECH),
    audio("wav2vec2-ctc", "Wav2Vec2ForCTC", SPEECH,
          lambda: {"input_values": torch.randn(BATCH, 400)}),  # its loss decides on the values of labels
    audio("hubert", "HubertForSequenceClassification", SPEECH),
    audio("wavlm", "WavLMForSequenceClassification", SPEECH),
    audio("unispeech", "UniSpeechForSequenceClassification", SPEECH),
    audio("data2vec-audio", "Data2VecAudioForSequenceClassification", {**SPEECH, "conv_pos_kernel_size": 3}),
    audio("sew", "SEWForSequenceClassification", SPEECH),
    audio("whisper", "WhisperForConditionalGeneration",
          {"vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
           "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER,
           "decoder_ffn_dim": INNER, "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32,
           "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None, "init_std": 0.2,
           **SPECIAL}, spectra, capture={"dynamic": {"input_features": [0], "decoder_input_ids": [0, 1],
                                                     "labels": [0, 1]}}),
    audio("ast", "ASTForAudioClassification",
          {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
           "intermediate_size": INNER, "patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 24,
           "num_mel_bins": 8, "initializer_range": 0.2, **LABELS},
          lambda: {"input_values": torch.randn(BATCH, 24, 8), "labels": torch.arange(BATCH) % 3},
          capture={"dynamic": {"input_values": [0], "labels": [0]}}),
    audio("speech-to-text", "Speech2TextForConditionalGeneration",
          {"vocab_size": VOCABULARY, "d_model": HIDDEN, "encoder_layers": LAYERS, "decoder_layers": LAYERS,
           "encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS, "encoder_ffn_dim": INNER,
           "decoder_ffn_dim": INNER, "input_feat_per_channel": 8, "conv_channels": 16, "max_source_positions": 40,
           "max_target_positions": 32, "decoder_start_token_id": 1, "init_std": 0.2, **SPECIAL},
          lambda: {**spectra(), "input_features": torch.randn(BATCH, 40, 8)},
          capture={"dynamic": {"input_features": [0, 1], "decoder_input_ids": [0, 1], "labels": [0, 1]}}),
]  # fmt: skip

MULTIMODAL = [
    both("clip", "CLIPModel", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16}, unpaired),
    both("siglip", "SiglipModel", {"text_config": TEXT, "vision_config": VISION}),
    both("chinese-clip", "ChineseCLIPModel", {"text_config": TEXT, "vision_config": VISION, "projection_dim": 16},
         unpaired),
    both("altclip", "AltCLIPModel",
         {"text_config": {**TEXT, "project_dim": 16}, "vision_config": VISION, "projection_dim": 16},
         limits={"shapes": "the contrastive loss takes len() of a tensor, which torch.export fixes"}),
    both("blip", "BlipForImageTextRetrieval",
         {"text_config": {**TEXT, "encoder_hidden_size": HIDDEN}, "vision_config": VISION, "projection_dim": 16,
          "image_text_hidden_size": 16}, unpaired),
    both("git", "GitForCausalLM", {**TEXT, "vision_config": VISION},
         unpaired),
    both("vilt", "ViltForImageAndTextRetrieval", {**VIT, **TEXT, "max_image_length": -1},
         lambda: {**words(), **images()(), "pixel_mask": torch.ones(BATCH, 32, 32, dtype=torch.long)},
         limits={"capture": "the sizes of images are read from the pixel mask"}),
    both("llava", "LlavaForConditionalGeneration",
         {"text_config": {**TEXT, "model_type": "llama", "initializer_range": 0.2},
          "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 16},
          "image_token_id": VOCABULARY - 1, "vision_feature_layer": -1}, pictures, other=lambda: pictures(LENGTH + 2),
         limits={"shapes": "the number of image tokens, a value, is compared with the number of images"}),
    both("clap", "ClapTextModelWithProjection", {**TEXT, "projection_dim": 16}, words),
    both("flava", "FlavaTextModel", TEXT, words),
    both("trocr", "TrOCRForCausalLM",
         {"vocab_size": VOCABULARY, "d_model": HIDDEN, "decoder_layers": LAYERS, "decoder_attention_heads": HEADS,
          "decoder_ffn_dim": INNER, "max_position_embeddings": 32, **SPECIAL},
         lambda: {**words(), "labels": torch.randint(3, VOCABULARY, (BATCH, LENGTH))}),
    both("vision-encoder-decoder", "VisionEncoderDecoderModel",
         {"encoder": {"model_type": "vit", **VISION},
          "decoder": {"model_type": "bert", **TEXT, "is_decoder": True, "add_cross_attention": True},
          "decoder_start_token_id": 1, "pad_token_id": 0},
         lambda: {**images()(), "decoder_input_ids": words()["input_ids"], "labels": words()["input_ids"]}),
    both("layoutlmv3", "LayoutLMv3ForSequenceClassification",
         {**TEXT, "max_2d_position_embeddings": 32, "coordinate_size": 4, "shape_size": 4, "input_size": 32,
          "patch_size": 8, "num_labels": 3, "rel_pos_bins": 8, "max_rel_pos": 16, "rel_2d_pos_bins": 8,
          "max_rel_2d_pos": 16},
         lambda: {**words(), **images()(), "bbox": torch.arange(4).expand(BATCH, LENGTH, 4).contiguous(),
                  "labels": torch.arange(BATCH) % 3}),
]  # fmt: skip

ENTRIES: list[Entry] = [*IMAGE_MODELS, *AUDIO_MODELS, *MULTIMODAL]
