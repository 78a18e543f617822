"""Adapters on compressed models: LoRA over quantized linears through peft (lora), NF4 and FP4 for
QLoRA (codebook, nf4_linear), adapters that begin by cancelling the error of quantization (loftq),
and adapters merged back into quantized weights (merge). peft is imported when the first adapter is
made."""
