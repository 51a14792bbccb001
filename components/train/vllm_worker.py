"""The half of vllm_rollout.py that runs in vLLM's own environment: nothing of forja's is imported here.

Requests and answers are lines of JSON on stdin and stdout. The first names the model's folder, each one after it has
prompts; before all but the first of those the weights in the folder are read anew.
"""

import json
import os
import shutil
import sys
from typing import IO, Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is no answer
    first = json.loads(sys.stdin.readline() or "null")
    if first is None:
        return
    try:
        serve(first, answers)
    finally:
        shutil.rmtree(first["folder"], ignore_errors=True)


def serve(first: dict[str, Any], out: IO[str]) -> None:
    import torch
    from vllm import LLM

    llm = LLM(
        model=first["folder"],
        skip_tokenizer_init=True,
        generation_config="vllm",  # nothing is set that the request does not say
        dtype=first["dtype"],
        max_model_len=first["context"],
        max_num_seqs=first["rows"],
        kv_cache_memory_bytes=first["cache"],
        gpu_memory_utilization=0.01,  # no more than a check at the start: the cache's size is given
        enable_prefix_caching=False,  # it would be of older weights
        enforce_eager=not torch.cuda.is_available(),  # a compiler is worth its minutes on a GPU only
        seed=0,
    )
    print("{}", file=out, flush=True)
    fresh = True
    for line in sys.stdin:
        if not fresh:
            llm.collective_rpc("reload_weights", kwargs={"weights_path": first["folder"]})
        fresh = False
        print(json.dumps({"answers": answered(llm, json.loads(line))}), file=out, flush=True)


def answered(llm: Any, asked: dict[str, Any]) -> list[list[int]]:
    from vllm import SamplingParams

    how = [
        SamplingParams(
            temperature=asked["temperature"],
            max_tokens=asked["max_new_tokens"],
            stop_token_ids=[asked["stop"]],
            ignore_eos=True,
            detokenize=False,
            seed=seed,
        )
        for seed in asked["seeds"]
    ]
    prompts = [{"prompt_token_ids": ids} for ids in asked["prompts"]]
    return [list(row.outputs[0].token_ids) for row in llm.generate(prompts, how, use_tqdm=False)]


if __name__ == "__main__":
    main()
