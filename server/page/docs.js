// The API documentation. Sends the key of the session, which the page at / stores, with the description's request and
// with every request that a reader tries.
import { apiKey, authorization, setApiKey } from "./api.js";

const form = document.getElementById("key-form");

async function show() {
  const response = await fetch("openapi.json", { headers: authorization() });
  if (response.status === 401 || response.status === 403) {
    form.hidden = false;
    document.getElementById("problem").textContent = apiKey() ? (await response.json()).error.message : "";
    return;
  }
  form.hidden = true;
  window.SwaggerUIBundle({
    spec: await response.json(),
    domNode: document.getElementById("documentation"),
    presets: [window.SwaggerUIBundle.presets.apis],
    validatorUrl: null,
    requestInterceptor(request) {
      // The key that a reader gave swagger-ui's own form goes first.
      request.headers = { ...authorization(), ...request.headers };
      return request;
    },
  });
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  setApiKey(document.getElementById("key").value);
  show();
});
show();
