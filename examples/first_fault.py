"""A small transformer reads handwritten digits, row by row. Its loss stays far too high: why?"""

import torch
from sklearn.datasets import load_digits
from torch import nn

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32) / 16
labels = torch.tensor(digits.target)


class Reader(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.embed = nn.Linear(8, width)
        self.position = nn.Parameter(torch.zeros(8, width))
        layer = nn.TransformerEncoderLayer(width, 4, 128, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, 10)

    def forward(self, rows):
        states = self.encoder(self.embed(rows) + self.position)
        return torch.softmax(self.head(states.mean(1)), dim=-1)


torch.manual_seed(0)
model = Reader()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
for epoch in range(8):
    model.train()
    for batch in torch.randperm(1400).split(32):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = model(images[1400:]).argmax(1) == labels[1400:]
    print(f"epoch {epoch}: loss {loss.item():.3f}, test accuracy {right.float().mean():.3f}")
