"""TRL's side of step.py: its GRPOTrainer as it is, with clocks around the methods that are its phases."""

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from step_cases import CASES, LEARNING_RATE, Case, prompt_text, read_prompts, reward
from step_records import StepRecord, write_records

from megatron_riskpo.observability.timing import PhaseTimer


def even_share(completion_ids: list[list[int]], **unused: Any) -> list[float]:
    """TRL's reward function."""
    return [reward(response) for response in completion_ids]


def trl_config(case: Case, folder: Path, num_steps: int) -> Any:
    """One optimizer step on case.num_responses, sampled in one batch; float32, no reference model, nothing written."""
    from trl import GRPOConfig

    passes = case.num_responses // case.trl_micro_batch
    return GRPOConfig(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        gradient_checkpointing=False,  # TRL's default trades time for memory
        per_device_train_batch_size=case.trl_micro_batch,
        gradient_accumulation_steps=passes,
        steps_per_generation=passes,
        num_generations=case.group_size,
        num_iterations=1,
        max_completion_length=case.max_response_tokens,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_steps=num_steps,
        shuffle_dataset=False,
        seed=0,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def timed_trainer(case: Case, folder: Path, num_warmup: int, num_steps: int) -> Any:
    """A GRPOTrainer whose `records` has one entry a step, warm-up steps included."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOTrainer

    class TimedTrainer(GRPOTrainer):
        """TRL has no hook around sampling and scoring: its two methods are wrapped."""

        records: list[StepRecord]
        timer: PhaseTimer

        def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any, **named: Any) -> Any:
            warming_up = len(self.records) < num_warmup
            self.generation_config.max_new_tokens = (
                case.warmup_response_tokens if warming_up else case.max_response_tokens
            )
            with self.timer("rollout"):
                completion_ids, logprobs = super()._generate_single_turn(prompt_ids, *rest, **named)
            self.prompt_tokens = sum(map(len, prompt_ids))
            self.response_lengths = [len(ids) for ids in completion_ids]
            return completion_ids, logprobs

        def _calculate_rewards(self, *rest: Any, **named: Any) -> Any:
            with self.timer("reward"):
                rewards = super()._calculate_rewards(*rest, **named)
            self.mean_reward = float(rewards.mean())
            return rewards

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            with self.timer("preparation"):
                return super()._generate_and_score_completions(inputs)

    trainer = TimedTrainer(
        model=str(folder / "model"),
        reward_funcs=even_share,
        args=trl_config(case, folder, num_warmup + num_steps),
        train_dataset=Dataset.from_dict({"prompt": [prompt_text(tokens) for tokens in read_prompts(folder)]}),
        # AutoTokenizer would make a byte-level tokenizer of it, as Qwen2 has.
        processing_class=PreTrainedTokenizerFast.from_pretrained(folder / "model"),
    )
    trainer.records, trainer.timer = [], PhaseTimer()
    trainer.add_callback(_step_clock(trainer))
    return trainer


def _step_clock(trainer: Any) -> Any:
    """From the end of one optimizer step to the end of the next."""
    from transformers import TrainerCallback

    class StepClock(TrainerCallback):
        last_end = 0.0

        def on_train_begin(self, *arguments: Any, **named: Any) -> None:
            self.last_end = time.perf_counter()

        def on_step_end(self, *arguments: Any, **named: Any) -> None:
            now = time.perf_counter()
            trainer.records.append(_record(trainer, now - self.last_end))
            trainer.timer.take()
            self.last_end = now

    return StepClock()


def _record(trainer: Any, seconds: float) -> StepRecord:
    """Preparation contains rollout and reward; the update is what is left of the step."""
    timer = trainer.timer
    phases = {
        "rollout": timer.seconds("rollout"),
        "reward": timer.seconds("reward"),
        "advantage": timer.seconds("preparation") - timer.seconds("rollout") - timer.seconds("reward"),
        "update": seconds - timer.seconds("preparation"),
    }
    return StepRecord(seconds, phases, trainer.prompt_tokens, trainer.response_lengths, trainer.mean_reward)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--warmup", type=int, required=True)
    arguments = parser.parse_args()
    case = CASES[arguments.case]
    torch.set_num_threads(case.num_cores)
    trainer = timed_trainer(case, arguments.folder, arguments.warmup, arguments.steps)
    trainer.train()
    write_records(trainer.records[arguments.warmup :], arguments.output)


if __name__ == "__main__":
    main()
