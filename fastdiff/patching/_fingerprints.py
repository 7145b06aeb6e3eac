"""Made by ``python -m fastdiff.patching._make_fingerprints``: function -> hash of its source -> versions."""

FINGERPRINTS: dict[str, dict[str, str]] = {
    "diffusers.guiders.classifier_free_guidance:ClassifierFreeGuidance.forward": {
        "3435ef516f2facd9": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.guiders.guider_utils:rescale_noise_cfg": {
        "5fb3b92de8af36bb": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.activations:GEGLU.forward": {
        "94565c7de8698a8a": "0.38.0 0.39.0 0.40.0",
        "5a502fc858371b55": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.activations:GEGLU.gelu": {
        "ad8db4f1db313f3c": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.activations:GELU.forward": {
        "ff6f0334d5159c1a": "0.38.0 0.39.0 0.40.0",
        "a27bd4a15e35e4a5": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.activations:GELU.gelu": {
        "8d932bd22e4bf74b": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.activations:SwiGLU.forward": {
        "361d6281c98cc8a8": "0.38.0 0.39.0 0.40.0",
        "5fbb2410c083a2b6": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention:BasicTransformerBlock.forward": {
        "1041ab3406a96968": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention:JointTransformerBlock.forward": {
        "7289a658820ca378": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention:LuminaFeedForward.forward": {
        "82f50e7c3c77455f": "0.38.0 0.39.0 0.40.0",
        "3d71d52a1547139f": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention:TemporalBasicTransformerBlock.forward": {
        "da551a532c1f3928": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:AllegroAttnProcessor2_0.__call__": {
        "91e0ebd9c6c63af9": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:Attention.forward": {
        "b02fc45725a8e8f9": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:Attention.norm_encoder_hidden_states": {
        "d986d77cbfb97f7b": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:Attention.prepare_attention_mask": {
        "eb4d726ff8ee054b": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:AttnAddedKVProcessor2_0.__call__": {
        "e11a181a6f642762": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:AttnProcessor2_0.__call__": {
        "01535ae8fd5c44d1": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:AuraFlowAttnProcessor2_0.__call__": {
        "2da970b35b22cd58": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:CogVideoXAttnProcessor2_0.__call__": {
        "02fc273de2e3ce93": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:HunyuanAttnProcessor2_0.__call__": {
        "6b2c81b7280e2003": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:JointAttnProcessor2_0.__call__": {
        "2fb36a7eb99a8a2d": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:MochiAttention.forward": {
        "7d1a0fe74490e394": "0.38.0 0.39.0 0.40.0",
        "4341a14c8ef04154": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:MochiAttnProcessor2_0.__call__": {
        "97865caddd873e13": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:MochiVaeAttnProcessor2_0.__call__": {
        "fff8bf5a7293191f": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:SanaMultiscaleLinearAttention.forward": {
        "ac6b237940cc95b0": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:SpatialNorm.forward": {
        "614b1925ea63f134": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:StableAudioAttnProcessor2_0.__call__": {
        "ca836df658960a2e": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_dc:Decoder.forward": {
        "77cab4219872bd0a": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_dc:ResBlock.forward": {
        "ec78c71b5fe9afc7": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox:CogVideoXDecoder3D.forward": {
        "dec0c501a7648b68": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox:CogVideoXEncoder3D.forward": {
        "6b466adc73034dd1": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox:CogVideoXResnetBlock3D.forward": {
        "9a67d4373e37782e": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_cogvideox:CogVideoXSpatialNorm3D.forward": {
        "4569ad86a97a65b6": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video:HunyuanVideoDecoder3D.forward": {
        "798788aec3b054a7": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video:HunyuanVideoEncoder3D.forward": {
        "ad072b13c641b717": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video:HunyuanVideoResnetBlockCausal3D.forward": {
        "539d90c749600658": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuanimage:HunyuanImageAttentionBlock.forward": {
        "b4567c7b0cf3919e": "0.38.0 0.39.0 0.40.0",
        "11fb9619646263ae": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuanimage:HunyuanImageDecoder2D.forward": {
        "b6557094344d8a91": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuanimage:HunyuanImageEncoder2D.forward": {
        "235c30450b147d74": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuanimage:HunyuanImageResnetBlock.forward": {
        "a1e9a1267868d2f8": "0.38.0 0.39.0 0.40.0",
        "2a1e1dc2f3286622": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuanimage_refiner:HunyuanImageRefinerDecoder3D.forward": {
        "ddbb2b0006bb2cf8": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuanimage_refiner:HunyuanImageRefinerEncoder3D.forward": {
        "4313f1a56c54c6ec": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuanimage_refiner:HunyuanImageRefinerRMS_norm.forward": {
        "97ce19a89fbfa4c7": "0.38.0 0.39.0 0.40.0",
        "8a47e806d3ba6b1b": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuanimage_refiner:HunyuanImageRefinerResnetBlock.forward": {
        "6b843a854ea0dbd9": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15:HunyuanVideo15Decoder3D.forward": {
        "ddbb2b0006bb2cf8": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15:HunyuanVideo15Encoder3D.forward": {
        "66bde065e45867b3": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15:HunyuanVideo15RMS_norm.forward": {
        "97ce19a89fbfa4c7": "0.38.0 0.39.0 0.40.0",
        "8a47e806d3ba6b1b": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15:HunyuanVideo15ResnetBlock.forward": {
        "6b843a854ea0dbd9": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_ltx2:LTX2VideoResnetBlock3d.forward": {
        "2dfcdb65a6a6dc42": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_ltx2:PerChannelRMSNorm.forward": {
        "311efab5b9bbc64e": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_ltx:LTXVideoDecoder3d.forward": {
        "8ffac93765179e3f": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_ltx:LTXVideoEncoder3d.forward": {
        "fbba97ea138f6958": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_ltx:LTXVideoResnetBlock3d.forward": {
        "2a4fba66b8935529": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_magvit:EasyAnimateDecoder.forward": {
        "44a6f10102074e1c": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_magvit:EasyAnimateEncoder.forward": {
        "491372ea58834adb": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_magvit:EasyAnimateResidualBlock3D.forward": {
        "74194422bbc38fa2": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_mochi:MochiChunkedGroupNorm3D.forward": {
        "483a2df088fd6bad": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_mochi:MochiEncoder3D.forward": {
        "dfe5cc2716f5a788": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_mochi:MochiResnetBlock3D.forward": {
        "df65e7d69b3da5b5": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage21:QwenImage21Decoder3d.forward": {
        "d2e3e7a156c565b8": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage21:QwenImage21Encoder3d.forward": {
        "4e7f17eb5dbdcb93": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage21:QwenImage21RMS_norm.forward": {
        "8a47e806d3ba6b1b": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage21:QwenImage21ResidualBlock.forward": {
        "ca2367fdafa758c5": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage:QwenImageDecoder3d.forward": {
        "63e8f2032499d0f1": "0.38.0 0.39.0 0.40.0",
        "a630fd3fcc231c3d": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage:QwenImageEncoder3d.forward": {
        "03eefd608766b13c": "0.38.0 0.39.0 0.40.0",
        "1e04744fa9e99b47": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage:QwenImageRMS_norm.forward": {
        "97ce19a89fbfa4c7": "0.38.0 0.39.0 0.40.0",
        "8a47e806d3ba6b1b": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_qwenimage:QwenImageResidualBlock.forward": {
        "bd7fcfc995f5fd33": "0.38.0 0.39.0 0.40.0",
        "8700c3c8e9c024e2": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_temporal_decoder:TemporalDecoder.forward": {
        "e4a6f6caf4ea3152": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_wan:WanDecoder3d.forward": {
        "58d6e63a9cc703ab": "0.38.0 0.39.0 0.40.0",
        "6830e4bdaf1c5827": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_wan:WanEncoder3d.forward": {
        "2f2608492f24942a": "0.38.0 0.39.0 0.40.0",
        "433a74d514c7be3f": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_wan:WanRMS_norm.forward": {
        "97ce19a89fbfa4c7": "0.38.0 0.39.0 0.40.0",
        "8a47e806d3ba6b1b": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_wan:WanResidualBlock.forward": {
        "8be8d50421b0ccc6": "0.38.0 0.39.0 0.40.0",
        "d0ac48d09be45d6c": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.vae:Decoder.forward": {
        "9c7b35295019d0fe": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.vae:Encoder.forward": {
        "ebd7f3fd6bc29ab0": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.vae:MaskConditionDecoder.forward": {
        "b9260077ca8a4bd2": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.controlnets.controlnet_xs:UNetControlNetXSModel.forward": {
        "3fdbe6c9d5ce012e": "0.38.0",
        "40641f3a152d88c2": "0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.embeddings:Timesteps.forward": {
        "c6274fb62c585377": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.embeddings:apply_rotary_emb": {
        "11726922bd1ef54d": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.embeddings:apply_rotary_emb_allegro": {
        "866b23845e529087": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.embeddings:get_1d_rotary_pos_embed": {
        "57fbee87d72c045a": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:AdaGroupNorm.forward": {
        "a35c66d43c6edce6": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:AdaLayerNorm.forward": {
        "9fc2febf87bcf42c": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:AdaLayerNormContinuous.forward": {
        "6a75590f4fb9b748": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:AdaLayerNormZero.forward": {
        "51382d7ba9537d28": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:AdaLayerNormZeroSingle.forward": {
        "b33be1820cb44f10": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:CogVideoXLayerNormZero.forward": {
        "d68438e342aad89d": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:CogView3PlusAdaLayerNormZeroTextImage.forward": {
        "8c34fc9c236e9ebb": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:FP32LayerNorm.forward": {
        "1f774f77e5bd6205": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:LpNorm.forward": {
        "8bf86dd83ad5759c": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:LuminaLayerNormContinuous.forward": {
        "a03baeb9a5eda05a": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:LuminaRMSNormZero.forward": {
        "5f17d512a5fd6b51": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:MochiRMSNorm.forward": {
        "6fe665d45e0a6638": "0.38.0 0.39.0 0.40.0",
        "d493b6913f9e1764": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:RMSNorm.forward": {
        "116d78925efea302": "0.38.0 0.39.0 0.40.0",
        "831092ec4a25a89b": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:SD35AdaLayerNormZeroX.forward": {
        "035d8c5960425428": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.resnet:AlphaBlender.forward": {
        "13a777a6b12abb76": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.resnet:AlphaBlender.get_alpha": {
        "1d6d23c9d9942841": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.resnet:ResnetBlock2D.forward": {
        "e1834e748c5fb131": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.resnet:TemporalConvLayer.forward": {
        "275085ff13442005": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.resnet:TemporalResnetBlock.forward": {
        "acc9a8ccb4944678": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.auraflow_transformer_2d:AuraFlowFeedForward.forward": {
        "7fdf831837ab3838": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.auraflow_transformer_2d:AuraFlowJointTransformerBlock.forward": {
        "0a8ffc4014732e00": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.auraflow_transformer_2d:AuraFlowSingleTransformerBlock.forward": {
        "389d9b2a044654c1": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.cogvideox_transformer_3d:CogVideoXBlock.forward": {
        "4f344f7ae3090abf": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.consisid_transformer_3d:ConsisIDBlock.forward": {
        "70ad2fab65dc7eda": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.dit_transformer_2d:DiTTransformer2DModel.forward": {
        "6a486c860cff1de6": "0.38.0 0.39.0 0.40.0",
        "6ede5f5f693e7e92": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.hunyuan_transformer_2d:AdaLayerNormShift.forward": {
        "dd7f8582f54b3ebf": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.hunyuan_transformer_2d:HunyuanDiTBlock.forward": {
        "853cde9731eac527": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.sana_transformer:GLUMBConv.forward": {
        "ef91b80dca70c46c": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.sana_transformer:SanaAttnProcessor2_0.__call__": {
        "edac2764fc65a417": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.sana_transformer:SanaModulatedNorm.forward": {
        "725dc39e56520ba9": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.sana_transformer:SanaTransformerBlock.forward": {
        "ca51fb521a9b5c86": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.stable_audio_transformer:StableAudioDiTBlock.forward": {
        "59d7a73e5a852a19": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_2d:Transformer2DModel._get_output_for_continuous_inputs": {
        "c0a497a159b1f50f": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_2d:Transformer2DModel._operate_on_continuous_inputs": {
        "8f5df6fdb131f3ca": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_allegro:AllegroTransformerBlock.forward": {
        "144224957777e3d4": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_bria:BriaAttention.forward": {
        "38975cc788c7c51c": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_bria:BriaAttnProcessor.__call__": {
        "b78e6b3b4da9bb6d": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_bria:BriaEmbedND.forward": {
        "55299842b552976b": "0.38.0",
        "6b860557f88d1a9a": "0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_bria:BriaSingleTransformerBlock.forward": {
        "3870f7df6fb88d06": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_bria:BriaTransformerBlock.forward": {
        "0a04c932db86322c": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_bria:get_1d_rotary_pos_embed": {
        "eee3827fab5123f9": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_bria_fibo:BriaFiboAttention.forward": {
        "3f58f84303b595c8": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_bria_fibo:BriaFiboAttnProcessor.__call__": {
        "614a9e8845a229e9": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_bria_fibo:BriaFiboEmbedND.forward": {
        "55299842b552976b": "0.38.0",
        "6b860557f88d1a9a": "0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_bria_fibo:BriaFiboSingleTransformerBlock.forward": {
        "4696b5dcb63e50e7": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_bria_fibo:BriaFiboTransformerBlock.forward": {
        "85ae83ef6d8a56fb": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_chroma:ChromaAdaLayerNormContinuousPruned.forward": {
        "071449e94dfe995c": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_chroma:ChromaAdaLayerNormZeroPruned.forward": {
        "eec70d4b2a4a3881": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_chroma:ChromaAdaLayerNormZeroSinglePruned.forward": {
        "d2a34ef51350ee06": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_chroma:ChromaSingleTransformerBlock.forward": {
        "11c5cbf771716fa9": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_chroma:ChromaTransformerBlock.forward": {
        "96aaa8b8908e6ed9": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_chronoedit:WanAttention.forward": {
        "9607fd59123a6799": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_chronoedit:WanAttnProcessor.__call__": {
        "e9c273a6928e5111": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_chronoedit:WanTransformerBlock.forward": {
        "d723951c58b11cd9": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_chronoedit:_get_added_kv_projections": {
        "b7bef85412858502": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_chronoedit:_get_qkv_projections": {
        "6d06313c6b11188a": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_cogview3plus:CogView3PlusTransformerBlock.forward": {
        "79410f5761d54eab": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_cogview4:CogView4AdaLayerNormContinuous.forward": {
        "e86b3db14844b45c": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_cogview4:CogView4AdaLayerNormZero.forward": {
        "fba47ce2bff3db40": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_cogview4:CogView4AttnProcessor.__call__": {
        "fb82e9beeafb4a26": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_cogview4:CogView4TransformerBlock.forward": {
        "6bd97e3cbd0139cb": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_cosmos:CosmosAdaLayerNorm.forward": {
        "0bafbf304bae6b6e": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_cosmos:CosmosAdaLayerNormZero.forward": {
        "0032c82ed73099e8": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_cosmos:CosmosAttnProcessor2_0.__call__": {
        "3f95f762d987f13f": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_cosmos:CosmosTransformerBlock.forward": {
        "4192bbcc17f59f4d": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux2:Flux2Attention.forward": {
        "39e5e0cdf7300c1e": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux2:Flux2AttnProcessor.__call__": {
        "b809600f935a4a38": "0.38.0 0.39.0",
        "5f486eab380c0602": "0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux2:Flux2Modulation.forward": {
        "2f844764d2614873": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux2:Flux2Modulation.split": {
        "1f51cb3dad58a323": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux2:Flux2ParallelSelfAttention.forward": {
        "09b0ae0a8d9bc0b6": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux2:Flux2ParallelSelfAttnProcessor.__call__": {
        "8810881a50c0a90c": "0.38.0 0.39.0",
        "8fc9179fafc53957": "0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux2:Flux2PosEmbed.forward": {
        "119047ade9a93eeb": "0.38.0",
        "a50dac107e2757cc": "0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux2:Flux2SingleTransformerBlock.forward": {
        "b99e2b4b1410f29a": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux2:Flux2SwiGLU.forward": {
        "d4d04c0b8ac15e4b": "0.38.0",
        "a0b6997bd6ce8e83": "0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux2:Flux2TransformerBlock.forward": {
        "eaadb8cff0ffdcc8": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux:FluxAttention.forward": {
        "3f58f84303b595c8": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux:FluxAttnProcessor.__call__": {
        "c47a4d441446e3a5": "0.38.0 0.39.0",
        "620b83d19c5dc56d": "0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux:FluxPosEmbed.forward": {
        "35ae3f91a8ca0bfc": "0.38.0",
        "6b860557f88d1a9a": "0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux:FluxSingleTransformerBlock.forward": {
        "b1d5042d7e994482": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_flux:FluxTransformerBlock.forward": {
        "85ae83ef6d8a56fb": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hidream_image:HiDreamAttention.forward": {
        "003d904d04e1b334": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hidream_image:HiDreamAttnProcessor.__call__": {
        "d70850b7f6e21952": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hidream_image:HiDreamImageEmbedND.forward": {
        "8d8b4483658a450e": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hidream_image:HiDreamImageFeedForwardSwiGLU.forward": {
        "fb1e97dbd5d97536": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hidream_image:HiDreamImageOutEmbed.forward": {
        "b869671bb549b05b": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hidream_image:HiDreamImageSingleTransformerBlock.forward": {
        "99031d5c904ae0e6": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hidream_image:HiDreamImageTransformerBlock.forward": {
        "0a7003e09a9cff08": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hidream_image:apply_rope": {
        "3c606cdc5909a273": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hidream_image:rope": {
        "f711cfcc6e157cb4": "0.38.0",
        "361c213ee54bcbb0": "0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuan_video15:HunyuanVideo15AttnProcessor2_0.__call__": {
        "9ab787e4c210c402": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuan_video15:HunyuanVideo15IndividualTokenRefinerBlock.forward": {
        "46993695143467a3": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuan_video15:HunyuanVideo15TransformerBlock.forward": {
        "037187f627b8f761": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuan_video:HunyuanVideoAttnProcessor2_0.__call__": {
        "32bf2efe8d1423d7": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuan_video:HunyuanVideoIndividualTokenRefinerBlock.forward": {
        "46993695143467a3": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuan_video:HunyuanVideoSingleTransformerBlock.forward": {
        "a2486fa407a85895": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuan_video:HunyuanVideoTokenReplaceAdaLayerNormZero.forward": {
        "cde58db0b56da25d": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuan_video:HunyuanVideoTokenReplaceAdaLayerNormZeroSingle.forward": {
        "1cbd1e69d9bac3be": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuan_video:HunyuanVideoTokenReplaceSingleTransformerBlock.forward": {
        "18307749baa72cfb": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuan_video:HunyuanVideoTokenReplaceTransformerBlock.forward": {
        "4db41eceb850b64a": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuan_video:HunyuanVideoTransformerBlock.forward": {
        "037187f627b8f761": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuanimage:HunyuanImageAttnProcessor.__call__": {
        "8a84afdb0c341e75": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuanimage:HunyuanImageIndividualTokenRefinerBlock.forward": {
        "46993695143467a3": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuanimage:HunyuanImageSingleTransformerBlock.forward": {
        "ee89691c9abb1104": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_hunyuanimage:HunyuanImageTransformerBlock.forward": {
        "d5dac857cecf55cc": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_longcat_image:LongCatImageAttention.forward": {
        "3f58f84303b595c8": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_longcat_image:LongCatImageAttnProcessor.__call__": {
        "2684826b951e85cd": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_longcat_image:LongCatImagePosEmbed.forward": {
        "35ae3f91a8ca0bfc": "0.38.0",
        "6b860557f88d1a9a": "0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_longcat_image:LongCatImageSingleTransformerBlock.forward": {
        "b1d5042d7e994482": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_longcat_image:LongCatImageTransformerBlock.forward": {
        "85ae83ef6d8a56fb": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ltx2:LTX2Attention.forward": {
        "c8ed3d2f14ed9a72": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ltx2:LTX2AudioVideoAttnProcessor.__call__": {
        "798e9ef5c2480622": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ltx2:LTX2PerturbedAttnProcessor.__call__": {
        "085b004602556038": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ltx2:LTX2VideoTransformerBlock.forward": {
        "1569234a344b3421": "0.38.0 0.39.0",
        "fb44cc89960d05ee": "0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ltx2:LTX2VideoTransformerBlock.get_mod_params": {
        "124a0ae4e0497a9c": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ltx2:apply_interleaved_rotary_emb": {
        "2a99fb59182630c2": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ltx2:apply_split_rotary_emb": {
        "9238acdc6238eda4": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ltx:LTXAttention.forward": {
        "9f5064dc970f19db": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ltx:LTXVideoAttnProcessor.__call__": {
        "0e15ffdea54d47e4": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ltx:LTXVideoTransformerBlock.forward": {
        "a758b6f1ea788030": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ltx:apply_rotary_emb": {
        "2aacd71090f78415": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_lumina2:Lumina2AttnProcessor2_0.__call__": {
        "fbd7b910bd4f1dc6": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_lumina2:Lumina2TransformerBlock.forward": {
        "e034750cbb4a6c52": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_mochi:MochiLayerNormContinuous.forward": {
        "138bc78badb20fe7": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_mochi:MochiModulatedRMSNorm.forward": {
        "fdcb4f48e5e2368e": "0.38.0 0.39.0 0.40.0",
        "dbf8a2bfce0b8841": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_mochi:MochiRMSNormZero.forward": {
        "ee9363a1b218a930": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_mochi:MochiTransformerBlock.forward": {
        "09d1b755221259bf": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_omnigen:OmniGenAttnProcessor2_0.__call__": {
        "ad6a566f2a8c1ede": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_omnigen:OmniGenBlock.forward": {
        "71240dc5f084ce64": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_omnigen:OmniGenFeedForward.forward": {
        "df1d8ea26307d4b1": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ovis_image:OvisImageAttention.forward": {
        "3f58f84303b595c8": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ovis_image:OvisImageAttnProcessor.__call__": {
        "828606404d50e3ab": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ovis_image:OvisImagePosEmbed.forward": {
        "35ae3f91a8ca0bfc": "0.38.0",
        "6b860557f88d1a9a": "0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ovis_image:OvisImageSingleTransformerBlock.forward": {
        "77fbec485654f1e1": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_ovis_image:OvisImageTransformerBlock.forward": {
        "85ae83ef6d8a56fb": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_qwenimage:QwenDoubleStreamAttnProcessor2_0.__call__": {
        "d62cf83381e785d7": "0.38.0",
        "bb184140552e2778": "0.39.0",
        "8ff713f2f67bea48": "0.40.0 0.41.0",
        "96a136d4d7182b94": "0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_qwenimage:QwenImageTransformerBlock._modulate": {
        "4995e1bc4f8f8b77": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_qwenimage:QwenImageTransformerBlock.forward": {
        "6893f6994726c8ce": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_qwenimage:apply_rotary_emb_qwen": {
        "301574f536e537db": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_sd3:SD3SingleTransformerBlock.forward": {
        "6fc428cb13c1a1dd": "0.38.0 0.39.0 0.40.0",
        "9eb91a939718d319": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_skyreels_v2:SkyReelsV2Attention.forward": {
        "9607fd59123a6799": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_skyreels_v2:SkyReelsV2AttnProcessor.__call__": {
        "8a12d1b92ddbc57d": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_skyreels_v2:SkyReelsV2TransformerBlock.forward": {
        "da9d57063891e921": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_skyreels_v2:_get_added_kv_projections": {
        "34d2761213af8102": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_skyreels_v2:_get_qkv_projections": {
        "fb16afb1d7acb97a": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_temporal:TransformerSpatioTemporalModel.forward": {
        "5d3336da9f3061d8": "0.38.0 0.39.0 0.40.0",
        "2b12c803d2803630": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_temporal:TransformerTemporalModel.forward": {
        "510a83a85693132a": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_wan:WanAttention.forward": {
        "9607fd59123a6799": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_wan:WanAttnProcessor.__call__": {
        "81260944b709c95b": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_wan:WanTransformerBlock.forward": {
        "d723951c58b11cd9": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_wan:_get_added_kv_projections": {
        "b7bef85412858502": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_wan:_get_qkv_projections": {
        "6d06313c6b11188a": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_wan_animate:WanAttention.forward": {
        "9607fd59123a6799": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_wan_animate:WanAttnProcessor.__call__": {
        "81260944b709c95b": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_wan_animate:WanTransformerBlock.forward": {
        "d723951c58b11cd9": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_wan_animate:_get_added_kv_projections": {
        "b7bef85412858502": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_wan_animate:_get_qkv_projections": {
        "6d06313c6b11188a": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_wan_vace:WanVACETransformerBlock.forward": {
        "5eab0e0653c486db": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_z_image:FeedForward._forward_silu_gating": {
        "d2738b39cca3d750": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_z_image:FeedForward.forward": {
        "f40ebb0c0fe70df7": "0.38.0 0.39.0 0.40.0",
        "ff303a98791b998c": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_z_image:FinalLayer.forward": {
        "639f234df957b006": "0.38.0 0.39.0 0.40.0",
        "8879caf209690b51": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_z_image:ZImageTransformerBlock.forward": {
        "5032a8cb4b019245": "0.38.0 0.39.0 0.40.0",
        "bcd6c7e0ec399f41": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_z_image:ZSingleStreamAttnProcessor.__call__": {
        "91bcf3bff31f2794": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.unets.unet_2d:UNet2DModel.forward": {
        "07c9df69639af437": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.unets.unet_2d_blocks:AttnSkipUpBlock2D.forward": {
        "471069281da35679": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.unets.unet_2d_blocks:SkipUpBlock2D.forward": {
        "c8665d21bc8c9f08": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.unets.unet_2d_condition:UNet2DConditionModel.forward": {
        "b9eb55d32f9876e8": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.unets.unet_3d_condition:UNet3DConditionModel.forward": {
        "32eb8288075f7c7b": "0.38.0",
        "5f0afb8a2eed0bde": "0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.unets.unet_i2vgen_xl:I2VGenXLUNet.forward": {
        "268c1cc81a017355": "0.38.0",
        "136c2db748018dd9": "0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.unets.unet_kandinsky3:Kandinsky3ConditionalGroupNorm.forward": {
        "56ecee6312ce5f5d": "0.38.0 0.39.0 0.40.0",
        "50b943cc8463a881": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.unets.unet_kandinsky3:Kandinsky3UNet.forward": {
        "0675b0db9ec68e5f": "0.38.0",
        "af4a64860db01724": "0.39.0 0.40.0",
        "9bd759985881e6fa": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.unets.unet_motion_model:AnimateDiffTransformer3D.forward": {
        "f1ce7cb54138818d": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.unets.unet_motion_model:UNetMotionModel.forward": {
        "216fd0e3fca8094c": "0.38.0",
        "4c964ae7ae1c6439": "0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.unets.unet_spatio_temporal_condition:UNetSpatioTemporalConditionModel.forward": {
        "67e0563c3a0bf465": "0.38.0",
        "8cf7d6b36728590b": "0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.pipelines.audioldm2.modeling_audioldm2:AudioLDM2UNet2DConditionModel.forward": {
        "c374380a52c5c861": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
}
