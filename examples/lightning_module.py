"""A Lightning module that is watched: three lines, marked."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from diagnoser.integrations.lightning import DiagnoserCallback  # 1


class Digits(L.LightningModule):
    """A classifier of made-up points."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 32), nn.ReLU(), nn.Linear(32, 3))

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], _: int) -> torch.Tensor:
        """Returns the loss of a batch."""
        points, labels = batch
        return nn.functional.cross_entropy(self.layers(points), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns what steps the layers."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


L.seed_everything(0, verbose=False)
points = torch.randn(640, 10)
data = TensorDataset(points, points[:, :3].argmax(1))
callback = DiagnoserCallback(out="watched-lightning")  # 2
trainer = L.Trainer(
    max_epochs=3,
    accelerator="cpu",
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[callback],  # 3
)
trainer.fit(Digits(), DataLoader(data, batch_size=32, shuffle=True))
print(callback.attached.diagnosis.verdict)
