// The divider of a pair follows its slider; the slider above all pairs moves every one.
(function () {
  "use strict";
  function show(slider) {
    slider.closest(".stage").style.setProperty("--split", slider.value + "%");
  }
  var all = document.getElementById("all");
  var sliders = Array.prototype.slice.call(document.querySelectorAll(".stage input"));
  sliders.forEach(show); // a browser may restore the sliders of the last visit
  document.addEventListener("input", function (event) {
    if (event.target === all) {
      sliders.forEach(function (slider) {
        slider.value = all.value;
        show(slider);
      });
    } else if (event.target.closest(".stage")) {
      show(event.target);
    }
  });
})();
