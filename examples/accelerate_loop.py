"""A loop with accelerate that is watched: nothing but the `with` is needed."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import diagnoser  # 1

torch.manual_seed(0)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
points = torch.randn(640, 10)
data = DataLoader(TensorDataset(points, points[:, :3].argmax(1)), batch_size=16, shuffle=True)
model, optimizer, data = accelerator.prepare(model, optimizer, data)

with diagnoser.watch(out="watched-accelerate") as watch:  # 2
    for _ in range(3):
        for batch, labels in data:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(batch), labels)
                accelerator.backward(loss)
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
print(watch.diagnose().verdict)  # 3
