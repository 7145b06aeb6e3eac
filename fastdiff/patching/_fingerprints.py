"""Made by ``python -m fastdiff.patching._make_fingerprints``: function -> hash of its source -> versions."""

FINGERPRINTS: dict[str, dict[str, str]] = {
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
    "diffusers.models.attention_processor:Attention.prepare_attention_mask": {
        "eb4d726ff8ee054b": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.attention_processor:AttnProcessor2_0.__call__": {
        "01535ae8fd5c44d1": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.vae:Decoder.forward": {
        "9c7b35295019d0fe": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.autoencoders.vae:Encoder.forward": {
        "ebd7f3fd6bc29ab0": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.embeddings:Timesteps.forward": {
        "c6274fb62c585377": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.normalization:AdaLayerNormZero.forward": {
        "51382d7ba9537d28": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.resnet:ResnetBlock2D.forward": {
        "e1834e748c5fb131": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
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
    "diffusers.models.unets.unet_2d:UNet2DModel.forward": {
        "07c9df69639af437": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
    "diffusers.models.unets.unet_2d_condition:UNet2DConditionModel.forward": {
        "b9eb55d32f9876e8": "0.38.0 0.39.0 0.40.0 0.41.0 0.42.0 0.42.1",
    },
}
