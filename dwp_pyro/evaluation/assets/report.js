"use strict";

// A viewer is started when it comes into sight: each holds its volumes in the memory of the graphics card.
const waiting = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    if (isIntersecting) {
      waiting.unobserve(target);
      start(target).catch((problem) => {
        target.dataset.state = "failed";
        target.querySelector(".stage p").textContent = `The viewer cannot start: ${problem.message}`;
      });
    }
  }
}, { rootMargin: "200px" });

document.querySelectorAll(".viewer").forEach((viewer) => waiting.observe(viewer));

async function start(viewer) {
  const { layers, focus } = JSON.parse(viewer.querySelector("script").textContent);
  const nv = new niivue.Niivue({
    logLevel: "error",
    dragAndDropEnabled: false,
    isRadiologicalConvention: true,
    multiplanarShowRender: niivue.SHOW_RENDER.NEVER,
    multiplanarPadPixels: 6,
    crosshairColor: [1, 1, 1, 1],
    crosshairWidth: 0.3,
    crosshairWidthUnit: "percent",
    crosshairGap: 6,
    scrollRequiresFocus: true,
    loadingText: "",
  });
  await nv.attachToCanvas(viewer.querySelector("canvas"));
  nv.setMultiplanarLayout(niivue.MULTIPLANAR_TYPE.ROW);
  const controls = [...viewer.querySelectorAll(".layer")];
  const opacity = (control) => {
    const [shown, slider] = control.querySelectorAll("input");
    return shown.checked ? Number(slider.value) / 100 : 0;
  };
  const volumes = layers.map(async (layer, index) => {
    const colormap = `layer-${index}`;
    nv.addColormap(colormap, layer.colors);
    return niivue.NVImage.loadFromBase64({
      base64: layer.nifti,
      name: `${layer.title}.nii.gz`,
      colormap,
      cal_min: layer.low,
      cal_max: layer.high,
      opacity: opacity(controls[index]),
    });
  });
  nv.volumes = await Promise.all(volumes);
  nv.setVolume(nv.volumes[0], 0);  // all go to the graphics card at once
  const values = viewer.querySelector(".values");
  nv.onLocationChange = (location) => {
    const at = Array.from(location.mm).slice(0, 3).map((side) => Math.round(side)).join(", ");
    const read = location.values.map(({ value }, index) => {
      const { title, unit, digits } = layers[index];
      return `${title} ${value.toFixed(digits)}${unit && ` ${unit}`}`;
    });
    values.textContent = [`${at} mm`, ...read].join("  ·  ");
  };
  nv.scene.crosshairPos = nv.mm2frac(focus);
  nv.createOnLocationChange();
  nv.drawScene();
  controls.forEach((control, index) => {
    control.addEventListener("input", () => nv.setOpacity(index, opacity(control)));
  });
  window.addEventListener("beforeprint", () => nv.drawScene());
  viewer.dataset.state = "ready";
}
