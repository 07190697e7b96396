"""A `transformers.Trainer` that is watched: three lines, marked."""

import torch
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from diagnoser.integrations.transformers import DiagnoserCallback  # 1

torch.manual_seed(0)
WORDS, LENGTH = 60, 12


def sample() -> dict[str, torch.Tensor]:
    """Which of the words 10 and 11 stands in the text?"""
    label = torch.randint(2, ())
    words = torch.randint(20, WORDS, (LENGTH,))
    words[torch.randint(LENGTH, ())] = 10 + label
    return {"input_ids": words, "attention_mask": torch.ones(LENGTH).long(), "labels": label}


model = DistilBertForSequenceClassification(
    DistilBertConfig(vocab_size=WORDS, dim=32, n_heads=4, n_layers=2, hidden_dim=64)
)
callback = DiagnoserCallback(out="watched-trainer")  # 2
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="trained",
        max_steps=60,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=20,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    ),
    train_dataset=[sample() for _ in range(512)],
    callbacks=[callback],  # 3
)
trainer.train()
print(callback.attached.diagnosis.verdict)
