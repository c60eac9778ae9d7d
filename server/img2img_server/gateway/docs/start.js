// The gateway puts a line before this one that sets KEY: the development key, or "".
const ui = SwaggerUIBundle({
  url: "/openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  onComplete: () => KEY && ui.preauthorizeApiKey("x_api_key", KEY),
});
