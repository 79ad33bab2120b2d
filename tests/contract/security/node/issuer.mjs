// An OpenID provider whose client `robot` gets JSON Web Tokens: node issuer.mjs PORT SECRET KEYS.json
import { readFileSync } from "node:fs";
import Provider from "oidc-provider";

const [port, secret, keys] = process.argv.slice(2);
const provider = new Provider(`http://127.0.0.1:${port}`, {
  clients: [{ client_id: "robot", client_secret: secret, grant_types: ["client_credentials"], redirect_uris: [], response_types: [] }],
  jwks: { keys: JSON.parse(readFileSync(keys, "utf8")) },
  features: {
    devInteractions: { enabled: false },
    clientCredentials: { enabled: true },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => "urn:aiorch",
      getResourceServerInfo: (context) => ({
        scope: "infer",
        audience: "aiorch",
        accessTokenFormat: "jwt",
        accessTokenTTL: 120,
        jwt: { sign: { alg: context.get("x-algorithm") || "RS256" } },
      }),
    },
  },
  extraTokenClaims: () => ({ tenant: "factory", groups: ["robots"] }),
});
provider.listen(Number(port), "127.0.0.1", () => console.log("listening"));
