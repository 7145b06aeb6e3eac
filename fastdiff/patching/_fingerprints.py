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
    "diffusers.models.attention:BasicTransformerBlock.forward": {
        "1041ab3406a96968": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
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
    "diffusers.models.attention_processor:SpatialNorm.forward": {
        "614b1925ea63f134": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.autoencoder_kl_temporal_decoder:TemporalDecoder.forward": {
        "e4a6f6caf4ea3152": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
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
    "diffusers.models.normalization:AdaGroupNorm.forward": {
        "a35c66d43c6edce6": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:AdaLayerNormZero.forward": {
        "51382d7ba9537d28": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
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
    "diffusers.models.transformers.dit_transformer_2d:DiTTransformer2DModel.forward": {
        "6a486c860cff1de6": "0.38.0 0.39.0 0.40.0",
        "6ede5f5f693e7e92": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_2d:Transformer2DModel._get_output_for_continuous_inputs": {
        "c0a497a159b1f50f": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_2d:Transformer2DModel._operate_on_continuous_inputs": {
        "8f5df6fdb131f3ca": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_temporal:TransformerSpatioTemporalModel.forward": {
        "5d3336da9f3061d8": "0.38.0 0.39.0 0.40.0",
        "2b12c803d2803630": "0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.transformers.transformer_temporal:TransformerTemporalModel.forward": {
        "510a83a85693132a": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
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
