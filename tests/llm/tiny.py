"""A two-layer random Llama with a byte tokenizer, saved, and a few arithmetic records."""

import json
from pathlib import Path

import gguf
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per byte; 0 pads, 1 begins, 2 ends."""
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = {
        token: number for number, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    made.chat_template = CHAT
    return made


def merging_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with the words of a text, each with the blank before it, as in GPT-2."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text] * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


def save_base(folder: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


GGUF_LAYERS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def save_gguf(base: Path, folder: Path) -> Path:
    """Write the tiny Llama as a single GGUF file with eight-bit weights."""
    words = [
        *tokenizer().convert_ids_to_tokens(list(range(len(tokenizer())))),
        "ab",
    ]  # a byte-pair encoding needs a merge
    model = LlamaForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_context_length(1024)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges(["a b"])
    for name, add in zip(("bos", "eos", "pad"), (1, 2, 0), strict=True):
        getattr(writer, f"add_{name}_token_id")(add)
    for name, tensor in model.state_dict().items():
        kind = gguf.GGMLQuantizationType.Q8_0 if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), gguf.quants.quantize(tensor.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def _gguf_name(name: str) -> str:
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    layer = name.removesuffix(".weight")
    if layer in outside:
        return f"{outside[layer]}.weight"
    _, _, number, rest = layer.split(".", 3)
    return f"blk.{number}.{GGUF_LAYERS[rest]}.weight"


def save_data(path: Path, number: int = 16) -> Path:
    records = [{"instruction": f"What is {n} + 1?", "input": "", "output": f"It is {n + 1}."} for n in range(number)]
    path.write_text(json.dumps(records))
    return path


ANSWERS = {
    "boolq": "true",
    "piqa": "solution1",
    "social_i_qa": "answer1",
    "hellaswag": "ending1",
    "winogrande": "option1",
    "ARC-Easy": "answer1",
    "ARC-Challenge": "answer1",
    "openbookqa": "answer1",
    "MultiArith": "3.0",
    "gsm8k": "3",
    "AddSub": "3",
    "AQuA": "A",
    "SingleEq": "3",
    "SVAMP": "3",
}


def save_tasks(folder: Path) -> Path:
    """Write tasks in LLM-Adapters' layout, two questions each, and MMLU with two subjects."""
    for task, answer in ANSWERS.items():
        records = [{"instruction": f"{task} {n}?", "input": "", "output": "", "answer": answer} for n in range(2)]
        (folder / task).mkdir(parents=True)
        (folder / task / "test.json").write_text(json.dumps(records))
    for split, sizes in {"dev": (5, 5), "val": (1, 3)}.items():
        (folder / "mmlu" / split).mkdir(parents=True)
        for subject, size in zip(("world_history", "anatomy"), sizes, strict=True):
            rows = [f"{subject} {n}?,w,x,y,z,B" for n in range(size)]
            (folder / "mmlu" / split / f"{subject}_{split}.csv").write_text("\n".join(rows) + "\n")
    return folder
